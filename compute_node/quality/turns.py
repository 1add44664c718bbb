"""Who says, token by token, what a sequence's decode is computed with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from compute_node.moe.route import EXACT, RoutePolicy
from compute_node.quality.divergence import Divergence


@dataclass(frozen=True)
class Rung:
    """A way to decode. route: its name, "" is exact"""

    route: str = ""
    policy: RoutePolicy = EXACT


@dataclass(frozen=True)
class Turn:
    """What one token is computed with.

    is_checked: its logits are compared with exact ones
    trial:      what a check of it counts for
    """

    rung: Rung
    is_checked: bool = False
    trial: int = 0


class Turns(Protocol):
    """Of one sequence, or of all that share a budget. One thread."""

    def next(self) -> Turn:
        """For the next token."""
        ...

    def heard(self, turn: Turn, found: Divergence) -> None:
        """What the check of a turn found."""
        ...


@dataclass
class OneRoute:
    """The same for every token; of `check_every` the last is checked, 0: none."""

    rung: Rung
    check_every: int = 0
    _num: int = 0

    def next(self) -> Turn:
        self._num += 1
        is_checked = self.check_every > 0 and self._num % self.check_every == 0
        return Turn(self.rung, is_checked)

    def heard(self, turn: Turn, found: Divergence) -> None:
        """Changes nothing."""
