"""What a box has of the model's experts, as operators read it."""

from __future__ import annotations

from dataclasses import dataclass

from compute_node.boxes.link import WorkerLink
from proto.expert import ModelSpec
from proto.held_experts import HeldExperts
from proto.stats import fact


@dataclass(frozen=True)
class BoxFacts:
    """experts_held: that its store has; slots: experts that it holds in memory at once. None: the
    box never joined
    """

    experts_held: int | None = fact("of the model, that the store has")
    experts_total: int | None = fact("of the model")
    slots: int | None = fact("experts that may be resident")

    @classmethod
    def of(cls, held: HeldExperts, spec: ModelSpec, slots: int) -> BoxFacts:
        return cls(held.num(spec), spec.num_experts_total, slots)

    @classmethod
    def of_link(cls, link: WorkerLink, spec: ModelSpec) -> BoxFacts:
        """As the worker last said."""
        if not link.slots:
            return cls(None, spec.num_experts_total, None)
        return cls.of(link.held, spec, link.slots)
