"""What names experts before a router does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What a decode step has seen when it reaches the experts of `layer`. T: sequences.

    hidden: [T, D], what these experts get
    stream: [T, D], the residual stream that `hidden` is the norm of; None: not recognised
    output: [T, D], what this layer's resident experts add to the stream, their weights made to sum
            to what all of them do; None: not computed yet
    """

    layer: int
    hidden: Tensor
    stream: Tensor | None = None
    output: Tensor | None = None


class Guess(NamedTuple):
    """rank: how sure it is, 0 the surest; what a rank is worth at a distance is measured."""

    rank: int
    expert: int


class Predictor(Protocol):
    """Pure: reads nothing and waits for nobody.

    name: as `Foresight` counts it
    """

    @property
    def name(self) -> str: ...

    def knows(self, layer: int) -> bool:
        """Whether it can name experts of `layer`; may become true while a model runs."""

    def predict(self, seen: Seen, layer: int, top_k: int) -> list[Guess]:
        """What these tokens will want of `layer`, which comes after `seen.layer`; the surest first.

        top_k: the number of experts a token uses

        Called only for a layer that it knows.
        """
