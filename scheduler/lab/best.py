"""The average of a net's last updates, and the best of those averages."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

N = TypeVar("N", bound=nn.Module)


class Best(Generic[N]):
    """net: the best average so far; loss: its own, infinite before the first was judged

    patience: how many that are no better may follow it
    """

    def __init__(self, net: N, patience: int, loss: float = float("inf")) -> None:
        self.net, self._loss = copy.deepcopy(net), loss
        self._patience, self._num_since = patience, 0

    def is_final(self, average: N, loss: float) -> bool:
        """Another average was judged. Returns whether none that is better will be waited for."""
        self._num_since += 1
        if loss < self._loss:
            self.net, self._loss, self._num_since = copy.deepcopy(average), loss, 0
        return self._num_since >= self._patience


def move_average(average: nn.Module, net: nn.Module, update: int, average_updates: int) -> None:
    """Of about the last `average_updates` updates; of fewer in the beginning."""
    share = max(1 / average_updates, 1 / (1 + update / 10))
    with torch.no_grad():
        for kept, new in zip(average.parameters(), net.parameters(), strict=True):
            kept.lerp_(new, min(1.0, share))
