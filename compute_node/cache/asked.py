"""What a step needs of a layer's experts, and the misses of it that are on their way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from compute_node.store.memory import Borrowed
from proto.expert import ExpertKey


def never() -> None:
    """The check of a step that nobody gives up."""


@dataclass(eq=False)
class Waiter:
    """Who waits for a message's experts: the step that asked, or one after it was given up."""

    check: Callable[[], None]

    def __call__(self) -> None:
        self.check()


@dataclass(eq=False)
class Asked:
    """Misses that were asked for, and the iterator that they come from."""

    misses: list[ExpertKey]
    arrivals: Iterator[list[Borrowed]]
    waiter: Waiter


@dataclass(eq=False, slots=True)
class Needs:
    """One layer's part of a step. See `ExpertCache.step`."""

    layer: int
    used: list[ExpertKey]
    check: Callable[[], None]
    disproved: Callable[[], Sequence[ExpertKey]]
    guess: Callable[[], Sequence[ExpertKey]]
