"""What a decode step's token says of the first layers, before any of them is reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from compute_node.cache.expert_cache import ExpertCache
from compute_node.predict.predictor import EMBEDDING, Seen
from compute_node.predict.prefetcher import Prefetcher
from compute_node.predict.router_map import RouterMap
from compute_node.store.session import SessionLost


@dataclass(frozen=True)
class FirstLook:
    """One node's, where a predictor knows embeddings."""

    prefetcher: Prefetcher
    cache: ExpertCache

    @classmethod
    def of(
        cls, prefetcher: Prefetcher, cache: ExpertCache, learned: RouterMap | None
    ) -> Self | None:
        """None: nothing was learned about embeddings."""
        if learned is None or EMBEDDING not in learned.parts:
            return None
        return cls(prefetcher, cache)

    @property
    def pays(self) -> bool:
        """Nobody has looked at these layers yet, as running ahead may have, and they miss."""
        first = self.prefetcher.layers[0]
        return self.prefetcher.is_worth_asking(EMBEDDING) and not any(
            self.prefetcher.foresight.about(first)
        )

    def look(self, seen: Seen) -> None:
        """Have guesses read. seen: of `EMBEDDING`"""
        wanted = self.prefetcher.guess(seen)
        wrong = self.prefetcher.take_disproved()
        num_guesses = len(self.prefetcher.foresight)
        try:
            asked = self.cache.read_ahead(self.prefetcher.layers[0], wanted, wrong, num_guesses)
        except SessionLost:
            asked = ()  # the step's first layer notices it, says so, and opens another
        self.prefetcher.forget([key for key in wanted if key not in asked])
