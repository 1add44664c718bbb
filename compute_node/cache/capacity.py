"""How much of the experts a node may hold at once."""

from __future__ import annotations

from dataclasses import dataclass

from proto import errors
from proto.stats import fact


@dataclass(frozen=True)
class Capacity:
    """Bytes that resident experts may take: a share of each layer, or one pool of all layers.

    expert_bytes: of one exact record; shares are multiples of it
    num_parts: records of the smallest variant that lie in the room of one exact record
    """

    capacity_bytes: int
    expert_bytes: int
    moe_layers: tuple[int, ...]
    top_k: int
    pooled: bool
    num_parts: int = 1

    def __post_init__(self) -> None:
        """Raises MemoryExceeded naming the smallest that works."""
        smallest = self.top_k if self.pooled else self.top_k * len(self.moe_layers)
        if self.slots < smallest:
            scope = "one pool" if self.pooled else f"{len(self.moe_layers)} layers"
            raise errors.MemoryExceeded(
                f"{self.slots} slots cannot hold the {self.top_k} experts a token uses in {scope}: "
                f"give at least {smallest} slots"
            )

    @property
    @fact("experts that may be resident")
    def slots(self) -> int:
        return self.capacity_bytes // self.expert_bytes

    def layer_slots(self, layer: int) -> int:
        """That experts of `layer` may take."""
        if self.pooled:
            return self.slots
        share, rest = divmod(self.slots, len(self.moe_layers))
        return share + (self.moe_layers.index(layer) < rest)
