"""How many values fell between which bounds: what quantiles are estimated from, by us and by
Prometheus.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

from proto import stats_pb2 as pb


@dataclass
class Histogram:
    """bounds: of the buckets, ascending; a value on a bound falls below it
    counts: by bucket, one more than bounds: the last has no upper bound
    total:  sum of the values
    """

    bounds: tuple[float, ...]
    counts: list[int]
    total: float = 0.0

    @classmethod
    def empty(cls, bounds: tuple[float, ...]) -> Histogram:
        return cls(bounds, [0] * (len(bounds) + 1))

    @classmethod
    def from_pb(cls, message: pb.Histogram) -> Histogram:
        return cls(tuple(message.bounds), list(message.counts), message.total)

    def to_pb(self) -> pb.Histogram:
        return pb.Histogram(bounds=self.bounds, counts=self.counts, total=self.total)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def num(self) -> int:
        return sum(self.counts)

    def __add__(self, other: Histogram | int) -> Histogram:
        """Also to the 0 that `sum` begins with."""
        if isinstance(other, int):
            return self
        return self._with(other, 1)

    __radd__ = __add__

    def since(self, before: Histogram) -> Histogram:
        """What came after an earlier look. The daemon may have been started anew meanwhile."""
        later = self._with(before, -1)
        return self if min(later.counts) < 0 else later

    def _with(self, other: Histogram, times: int) -> Histogram:
        assert self.bounds == other.bounds, "their buckets differ"
        counts = [one + times * two for one, two in zip(self.counts, other.counts, strict=True)]
        return Histogram(self.bounds, counts, self.total + times * other.total)

    def quantile(self, share: float) -> float | None:
        """The value that `share` of all stay below, as if each bucket were evenly filled; beyond
        the last bound, that bound. None: there is no value.
        """
        left = share * self.num
        if not self.num:
            return None
        for (low, high), count in zip(pairwise((0.0, *self.bounds)), self.counts, strict=False):
            if count and left <= count:
                return low + (high - low) * left / count
            left -= count
        return self.bounds[-1]

    def cumulative(self) -> Iterator[tuple[str, float]]:
        """As Prometheus has it: each bound, and how many values are not above it."""
        names = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        return zip(names, map(float, accumulate(self.counts)), strict=True)

    def document(self) -> dict[str, object]:
        return {"bounds": [*self.bounds], "counts": [*self.counts], "total": self.total}
