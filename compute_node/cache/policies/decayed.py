"""Exponentially decayed frequency: the strongest simple policy, and our local fallback."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection

from proto.expert import ExpertKey


class Decayed:
    """Evicts the smallest count, where a use loses half its worth every `half_life_tokens`
    steps.
    """

    def __init__(self, half_life_tokens: float = 16.0) -> None:
        self._decay = 0.5 ** (1.0 / half_life_tokens)
        self._clock: Counter[int] = Counter()
        # Layer, expert: at the step of its last use.
        self._worth: defaultdict[int, dict[int, tuple[float, int]]] = defaultdict(dict)

    def on_step(self, layer: int, used: Collection[ExpertKey]) -> None:
        self._clock[layer] += 1
        worth, now = self._worth[layer], self._clock[layer]
        for key in used:
            worth[key.expert] = (self.rank(key) + 1.0, now)

    def rank(self, key: ExpertKey) -> float:
        worth, step = self._worth[key.layer].get(key.expert, (0.0, 0))
        return worth * math.pow(self._decay, self._clock[key.layer] - step)
