"""What an array-wise eviction policy is; its keyed twin runs in the node."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

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


@runtime_checkable
class AdvisingPolicy(RankingPolicy, Protocol):
    """One whose ranks reach a node late, where they are corrected by what was used since."""

    def unused_ranks(self) -> Ranks:
        """[L, E], as `ranks`, of an expert that its layer's next step does not use."""
        ...

    def heard_ranks(self, event: DecodeAccess) -> Ranks:
        """[L, E], what a node makes of the latest ranks after each layer's turn in the next step,
        which is not observed yet.
        """
        ...


def chosen(event: DecodeAccess) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Index of the step's experts in an [L, E] array."""
    return np.arange(len(event.topk_ids))[:, None], event.topk_ids.astype(np.intp)
