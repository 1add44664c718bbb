"""A histogram: what it keeps of values, over the wire and over time, and quantiles of it.

Planted faults seen red: two of one class share their counts, a restart gives negative counts, the
quantile of an upper bucket counts the lower ones, the sum of several loses one.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import pytest

from proto import stats
from proto.histogram import Histogram
from proto.stats import Absent, Stats, histogram, labelled


def of(*values: float) -> Histogram:
    found = Histogram.empty((1.0, 2.0, 4.0))
    for value in values:
        found.observe(value)
    return found


@dataclass
class Pond:
    jumps_m: Histogram = histogram("flashmoe_jumps", "Of frogs", (1.0, 2.0, 4.0), colour="green")


def test_it_comes_through_a_snapshot() -> None:
    pond, other = Pond(), Pond()
    pond.jumps_m.observe(1.5)
    other.jumps_m.observe(3.0)
    found = Stats.from_pb(stats.snapshot(labelled(pond, place="x"), labelled(other, place="y")))
    assert found.by("place")["x"].jumps_m == of(1.5)
    assert found.by("place")["y"].jumps_m == of(3.0)
    assert found.jumps_m == of(1.5, 3.0), "of several, the sum"
    (_, shown) = json.loads(json.dumps(found.document())).values()
    assert shown == {"bounds": [1.0, 2.0, 4.0], "counts": [0, 0, 1, 0], "total": 3.0}


def test_an_absent_one_has_no_value() -> None:
    assert Stats.from_pb(stats.snapshot(Absent(Pond))).jumps_m is None


def test_what_came_since() -> None:
    before, now = of(0.5, 3), of(0.5, 3, 3, 9)
    assert now.since(before) == of(3, 9)
    assert of(0.5).since(before) == of(0.5), "the daemon was started anew"


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ((), 0.5, None),
        ((0.1, 0.2), 0.5, 0.5),
        ((1.5, 1.6, 1.7, 3.0), 0.5, 1 + 2 / 3),
        ((0.5, 1.5, 1.6, 3.0), 0.75, 2.0),
        ((1.5, 1.6, 1.7, 3.0), 1.0, 4.0),
        ((9.0, 9.0), 0.5, 4.0),
    ],
)
def test_quantiles(values: tuple[float, ...], share: float, expected: float | None) -> None:
    found = of(*values).quantile(share)
    assert found == (None if expected is None else pytest.approx(expected))


def test_counting_is_cheap() -> None:
    """A token counts two. Red with a bound of 2 us on a busy machine; that is why it is 20."""
    found = Histogram.empty(tuple(float(bound) for bound in range(16)))
    start_s = time.perf_counter()
    for _ in range(10_000):
        found.observe(7.5)
    assert (time.perf_counter() - start_s) / 10_000 < 20e-6
