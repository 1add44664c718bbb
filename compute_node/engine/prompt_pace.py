"""How long prompts hold the compute thread while answers wait."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class PromptPace:
    """Prompts are computed layer by layer, a layer that takes long in several portions; between
    two portions they may give way.

    max_stall_s: how long they hold the thread at most, as far as portions allow
    """

    def __init__(self, max_stall_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_stall_s, self._clock = max_stall_s, clock
        self._began_s = clock()  # of the portion that is computed
        self._latest_s = 0.0  # that the latest took
        self._layer_s = 0.0  # that the portions of its layer took
        self.held_s = 0.0  # since an answer had a turn

    def begin(self) -> None:
        """A prompt's turn begins, or goes on."""
        self._began_s = self._clock()

    def end_portion(self) -> None:
        now_s = self._clock()
        self._latest_s, self._began_s = now_s - self._began_s, now_s
        self.held_s += self._latest_s
        self._layer_s += self._latest_s

    @property
    def is_due(self) -> bool:
        """Whether prompts will hold the thread too long by the end of another such portion."""
        return self.held_s + self._latest_s >= self._max_stall_s

    def end(self) -> None:
        """Answers have their turns now."""
        self.held_s = 0.0

    def num_portions(self) -> int:
        """Of the layer that begins, so that each takes half of `max_stall_s`, if the layer takes
        as long as the one before.
        """
        layer_s, self._layer_s = self._layer_s, 0.0
        return max(1, math.ceil(2 * layer_s / self._max_stall_s))
