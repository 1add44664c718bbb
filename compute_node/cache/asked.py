"""What a step needs of a layer's experts, and the misses of it that are on their way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from compute_node.cache.lender import Arrivals
from proto.expert import ExpertKey, RecordKey

Meanwhile = Callable[[Callable[[], bool]], None]
"""Called when a step is about to wait, with a function that says whether it need not any more."""


class Elsewhere(Protocol):
    """Which experts other boxes compute now."""

    def __contains__(self, key: ExpertKey, /) -> bool: ...

    def prepare(self, layer: int, experts: Iterable[int]) -> None:
        """Steps will likely use these: boxes that compute them read them. Waits for nobody."""


class Nowhere:
    """There are no other boxes."""

    def __contains__(self, key: ExpertKey, /) -> bool:
        return False

    def prepare(self, layer: int, experts: Iterable[int]) -> None:
        pass


NONE_SMALL: Mapping[int, str] = {}


def exact(keys: Iterable[ExpertKey]) -> list[RecordKey]:
    """Their exact records."""
    return [RecordKey(key) for key in keys]


def never() -> None:
    """The check of a step that nobody gives up."""


def sleep(arrived: Callable[[], bool]) -> None:
    """Leaves the time of a wait unused."""


@dataclass(eq=False)
class Waiter:
    """Who waits for a message's experts: the step that asked, or one after it was given up."""

    check: Callable[[], None]

    def __call__(self) -> None:
        self.check()


@dataclass(eq=False)
class Asked:
    """Misses that were asked for, and the iterator that they come from."""

    misses: list[RecordKey]
    arrivals: Arrivals
    waiter: Waiter


@dataclass(eq=False, slots=True)
class Needs:
    """One layer's part of a step. See `ExpertCache.step`."""

    layer: int
    used: list[ExpertKey]
    check: Callable[[], None]
    disproved: Callable[[], Sequence[ExpertKey]]
    guess: Callable[[], Sequence[ExpertKey]]
    meanwhile: Meanwhile
    small: Mapping[int, str]
