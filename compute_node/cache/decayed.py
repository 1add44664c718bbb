"""Exponentially decayed frequency: the strongest simple policy, and our local fallback."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

from proto.expert import ExpertKey


class Decayed:
    """Evicts the smallest count, where a use loses half its worth every `half_life_tokens`
    steps.
    """

    def __init__(self, half_life_tokens: float = 16.0) -> None:
        self._decay = 0.5 ** (1.0 / half_life_tokens)
        self._clock: Counter[int] = Counter()
        self._worth: dict[ExpertKey, tuple[float, int]] = {}  # at the step of its last use

    def on_step(self, layer: int, used: Collection[ExpertKey]) -> None:
        self._clock[layer] += 1
        for key in used:
            self._worth[key] = (self.rank(key) + 1.0, self._clock[layer])

    def rank(self, key: ExpertKey) -> float:
        worth, step = self._worth.get(key, (0.0, 0))
        return worth * math.pow(self._decay, self._clock[key.layer] - step)
