"""What a plan needs of a store: a manifest has it, and what a store on another box says."""

from __future__ import annotations

from typing import Protocol

from expert_store.manifest.size_classes import SizeClasses
from expert_store.manifest.sizing import Sizing
from proto.expert import ModelSpec


class StoreFacts(Protocol):
    """num_experts: that the store has, which may be a share of the model"""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def sizing(self) -> Sizing: ...

    @property
    def slot_bytes(self) -> int: ...

    @property
    def num_experts(self) -> int: ...

    @property
    def size_classes(self) -> SizeClasses: ...
