"""What an array-wise eviction policy is; its keyed twin runs in the node."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from proto.access import DecodeAccess

Ranks = NDArray[np.float64]


class RankingPolicy(Protocol):
    """Keeps an order over all experts, resident or not; knows nothing of slots."""

    def observe(self, event: DecodeAccess) -> None:
        """One more decode step. Learns; returns nothing."""
        ...

    def ranks(self) -> Ranks:
        """[L, E] of its own, never changed later: lower goes first, ties by layer and expert."""
        ...


def chosen(event: DecodeAccess) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Index of the step's experts in an [L, E] array."""
    return np.arange(len(event.topk_ids))[:, None], event.topk_ids.astype(np.intp)
