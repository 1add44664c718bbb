"""What is named ahead of later layers of one answer, rightly and wrongly."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploy.simulator.setting import Foresight


@dataclass(frozen=True)
class Name:
    """experts: of a layer, ascending"""

    layer: int
    experts: Sequence[int]


class Names:
    """Of the tokens `topk_ids`, [T, L, K]; each layer of each is named at most once.

    is_resident: whether a layer's expert is in its box's memory; such ones count as named, which
    changes no read
    """

    def __init__(
        self,
        topk_ids: NDArray[np.uint16],
        num_experts: int,
        foresight: Foresight,
        is_resident: Callable[[int, int], bool],
        seed: int,
    ) -> None:
        self._ids, self._num_experts, self._foresight = topk_ids, num_experts, foresight
        self._is_resident, self._random = is_resident, random.Random(seed)
        self._place = 0  # layers before the present one, of all tokens
        self._next = 0  # place that is named next
        self._is_next_foreseen = self._draw(foresight.next_token)

    def pass_layer(self) -> None:
        """The present layer is done."""
        self._place += 1
        if self._place % self._ids.shape[1] == 0:
            self._is_next_foreseen = self._draw(self._foresight.next_token)

    def take(self) -> Iterator[Name]:
        """Those that can come now; what nobody asks for comes later."""
        self._next = max(self._next, self._place + 1)
        while self._next <= self._last():
            token, layer = divmod(self._next, self._ids.shape[1])
            self._next += 1
            yield Name(layer, sorted(self._named(layer, self._ids[token, layer].tolist())))

    def _last(self) -> int:
        """Place that may be named now."""
        num_tokens, num_layers = map(int, self._ids.shape[:2])
        known_tokens = self._place // num_layers + 1 + self._is_next_foreseen
        end = num_layers * min(num_tokens, known_tokens)
        return min(self._place + self._foresight.layers_ahead, end - 1)

    def _named(self, layer: int, used: Sequence[int]) -> set[int]:
        foresight, named = self._foresight, set[int]()
        unused = [expert for expert in range(self._num_experts) if expert not in used]
        wrong_ratio = foresight.recall * (1 - foresight.precision) / foresight.precision
        for expert in used:
            misses = not self._is_resident(layer, expert)
            if not misses or self._draw(foresight.recall):
                named.add(expert)
            if misses and self._draw(wrong_ratio):
                named.add(self._random.choice(unused))
        return named

    def _draw(self, ratio: float) -> bool:
        return self._random.random() < ratio
