"""What a rule sees of one token at one layer."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class TokenChoice:
    """chosen: the router's experts, the best first

    gates:  [E], what an expert's weight is proportional to
    logits: [E], what the router compared
    """

    chosen: Sequence[int]
    gates: Sequence[float]
    logits: Sequence[float]


class Rule(Protocol):
    """Pure: the same choice of the same token and residents."""

    def choose(self, token: TokenChoice, resident: Container[int]) -> list[int]:
        """The experts to compute with, at least one and no more than were chosen."""
        ...


def best_first(values: Sequence[float]) -> list[int]:
    """Indices, the highest value first, the lowest index of equals."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))
