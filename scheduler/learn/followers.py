"""Which experts tend to follow which from one step to the next; one table for all nodes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DECAY = 0.01  # weight of the newest pair of steps, once enough were seen
PRIOR = 4  # pairs of steps with no follower, that every expert starts with
MAX_BYTES = 16 * 1024 * 1024  # a model whose table would be larger goes without


class Followers:
    """P(an expert is used | another of its layer was used one step before), [L, E, E].

    `learn` changes it, `shares` asks. chosen: [L, K], the experts of one step.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._shape = (num_layers, num_experts)
        num_rows = num_layers * num_experts
        self.is_kept = num_rows * num_experts * np.dtype(np.float32).itemsize <= MAX_BYTES
        self._table = np.zeros((num_rows if self.is_kept else 0, num_experts), np.float32)
        self._num_followed = np.full(num_rows, PRIOR)

    def learn(self, chosen: NDArray[np.intp], used: NDArray[np.bool_]) -> None:
        """After `chosen` came a step that used these experts, [L, E]."""
        if not self.is_kept:
            return
        at = self._rows(chosen)
        rows = self._table[at]  # [L, K, E]
        rate = np.maximum(DECAY, 1 / (1 + self._num_followed[at])).astype(np.float32)
        rows += rate[..., None] * (used.astype(np.float32)[:, None] - rows)
        self._table[at] = rows
        self._num_followed[at] += 1

    def shares(self, chosen: NDArray[np.intp]) -> NDArray[np.float32]:
        """[L, E], how often each expert followed these, on average; zero where none is kept."""
        if not self.is_kept or not chosen.shape[1]:
            return np.zeros(self._shape, np.float32)
        followers = self._table[self._rows(chosen)]  # [L, K, E]
        return np.asarray(followers.sum(axis=1) / chosen.shape[1])

    def _rows(self, chosen: NDArray[np.intp]) -> NDArray[np.intp]:
        return np.arange(self._shape[0])[:, None] * self._shape[1] + chosen
