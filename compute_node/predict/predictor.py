"""What names experts before a router does."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Predictor(Protocol):
    """Pure: reads nothing and waits for nobody. What its guesses are worth is measured by rank and
    distance, by the prefetcher.
    """

    def knows(self, layer: int) -> bool:
        """Whether it can name experts of `layer`; may become true while a model runs."""

    def predict(self, layer: int, hidden: Tensor, top_k: int) -> list[tuple[int, int]]:
        """Rank and expert, the surest first, of what these tokens will want of `layer`.

        hidden: [T, D], in an earlier layer; top_k: the number of experts a token uses

        Called only for a layer that it knows.
        """
