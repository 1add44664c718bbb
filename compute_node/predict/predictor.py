"""What names experts before a router does."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple, Protocol

from torch import Tensor

EMBEDDING = -1
"""The layer of what is seen before the first: the embedding of the token."""


@dataclass(frozen=True)
class Seen:
    """What a decode step has seen when it reaches the experts of `layer`. T: sequences.

    layer:  its number in the model, or `EMBEDDING`
    hidden: [T, D], what these experts get
    stream: [T, D], the residual stream that `hidden` is the norm of; None: not recognised
    output: [T, D], what this layer's resident experts add to the stream, their weights made to sum
            to what all of them do; None: not computed yet
    """

    layer: int
    hidden: Tensor
    stream: Tensor | None = None
    output: Tensor | None = None

    @property
    def is_early(self) -> bool:
        """Whether more will be seen of this layer: its output is all that is missing."""
        return self.stream is not None and self.output is None


class Guess(NamedTuple):
    """grade: how sure it is, 0 the surest, less than `NUM_GRADES`; what a grade of a predictor is
    worth at a distance is measured.
    """

    grade: int
    expert: int


class Predictor(Protocol):
    """Pure: reads nothing and waits for nobody.

    name: as `Foresight` counts it
    """

    @property
    def name(self) -> str: ...

    def knows(self, seen: Seen, layer: int) -> bool:
        """Whether it can name experts of `layer`, which comes after `seen.layer`; may become true
        while a model runs.
        """

    def scores(self, seen: Seen, layer: int) -> Tensor:
        """What the router of `layer` may give these tokens, [T, E], higher: sooner chosen. Called
        only for what it knows.
        """


# Of a score's distance from the boundary between what is chosen and what is not, over the spread of
# the candidates' scores: the least of each grade, and the least that is named at all.
_LEAST = (0.45, 0.3, 0.2, 0.15, 0.1, 0.075, 0.05, 0.025, 0.0, -0.025, -0.05, -0.1)
NUM_GRADES = len(_LEAST)
_BEYOND = 4  # candidates past the chosen


def graded(scores: Tensor, top_k: int) -> list[Guess]:
    """What is chosen by these scores, and what nearly is; each expert once, with its best grade.

    scores: [T, E], higher: sooner chosen
    """
    best, experts = scores.topk(min(top_k + _BEYOND, scores.shape[1]))
    found: dict[int, int] = {}
    for values, row in zip(best.tolist(), experts.tolist(), strict=True):
        boundary = sum(values[top_k - 1 : top_k + 1]) / len(values[top_k - 1 : top_k + 1])
        spread = values[0] - values[-1] or 1.0
        grade = 0
        for value, expert in zip(values, row, strict=True):
            while grade < NUM_GRADES and (value - boundary) / spread < _LEAST[grade]:
                grade += 1
            if grade == NUM_GRADES:
                break
            found[expert] = min(grade, found.get(expert, NUM_GRADES))
    guesses = [Guess(grade, expert) for expert, grade in found.items()]
    return sorted(guesses, key=itemgetter(0))
