"""Which box owns how many experts of a placement, and whether they fit its memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from deploy.simulator.setting import Setting
from proto.expert import ExpertKey


@dataclass(frozen=True)
class Owned:
    """fewest, most: experts of a layer; experts: of the model; slots: that fit its memory;
    expert_bytes: of one
    """

    box: str
    fewest: int
    most: int
    experts: int
    slots: int
    expert_bytes: float


def owned(setting: Setting) -> list[Owned]:
    """Of each box, as first owner."""
    owners, (num_layers, num_experts) = setting.owners(), setting.geometry.shape
    counts: list[Counter[int]] = []
    for layer in range(num_layers):
        keys = (ExpertKey(layer, expert) for expert in range(num_experts))
        counts.append(Counter(next(iter(owners.owners(key)), 0) for key in keys))
    return [
        Owned(
            spec.name,
            min(found[number] for found in counts),
            max(found[number] for found in counts),
            sum(found[number] for found in counts),
            spec.slots(setting.geometry.expert_bytes),
            setting.geometry.expert_bytes,
        )
        for number, spec in enumerate(setting.boxes)
    ]
