"""Has experts read that something names for a later layer, and withdraws those that it names no
more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compute_node.cache.expert_cache import ExpertCache
from compute_node.predict.foresight import Foresight
from proto.expert import ExpertKey


@dataclass(frozen=True)
class NamedReads:
    """predictor: as `Foresight` counts it"""

    predictor: str
    cache: ExpertCache
    foresight: Foresight

    def read(
        self, layer: int, distance: int, chosen: Sequence[ExpertKey], prepares: bool = True
    ) -> None:
        """All that a router of `layer`, `distance` layers ahead, is thought to choose. prepares:
        other boxes have not heard of it

        Raises SessionLost.
        """
        self.cache.room.expect(layer, chosen)
        wrong = [key for key in self.foresight.about(layer) if key not in chosen]
        for key in wrong:
            self.foresight.retract(key)
        elsewhere = self.cache.elsewhere
        if prepares:
            elsewhere.prepare(layer, (key.expert for key in chosen))
        missing = [key for key in chosen if key not in self.cache and key not in elsewhere]
        fresh = [key for key in missing if key not in self.foresight]
        asked = self.cache.read_ahead(layer, fresh, wrong, len(self.foresight) + len(fresh))
        for key in missing:
            if key in asked or key in self.foresight:
                self.foresight.guessed(key, self.predictor, distance)
