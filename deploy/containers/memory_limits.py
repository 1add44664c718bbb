"""What memory each container may use: its part of the plan, and room for its health check."""

from __future__ import annotations

from deploy.plan.budget import MemoryPlan
from deploy.plan.mebibytes import MIB
from deploy.plan.parts import OVERHEAD_BYTES
from deploy.settings import ServeSettings, parse_bytes
from deploy.stack.stack_plan import StackPlan
from deploy.terminal import console
from expert_store.manifest.manifest import Manifest
from proto import errors

HELPER = "helper"  # the service that is a worker or a shadow
STORE_ROOM_BYTES = 150 * MIB
# A container's limit holds its health check too, which is a process of its own.
_ROOM_BYTES = {
    "compute_node": 64 * MIB,
    "scheduler": 64 * MIB,
    "valkey": 88 * MIB,
    "gateway": 64 * MIB,
    HELPER: 64 * MIB,
}
_NODE_PARTS = (
    "dense_weights",
    "kv_cache",
    "prefill_buffers",
    "tokenizer",
    "grammar",
    "compute_node",
    "worker",
    "shadow",
)


def plan_containers(settings: ServeSettings) -> tuple[Manifest, MemoryPlan]:
    """The plan of the box, less what containers need beside it.

    Raises ConfigInvalid, ManifestInvalid, MemoryExceeded.
    """
    if settings.memory is None:
        plan = StackPlan.of(settings)
        return _manifest_of(plan), plan.memory
    beside_bytes = (
        sum(_ROOM_BYTES[name] for name in _beside_the_store(settings))
        + STORE_ROOM_BYTES
        - OVERHEAD_BYTES["expert_store"]
        - OVERHEAD_BYTES["launcher"]
    )
    ceiling_bytes = max(0, parse_bytes(settings.memory, "--memory") - beside_bytes)
    try:
        plan = StackPlan.of(settings.with_flags(memory=str(ceiling_bytes)))
    except errors.MemoryExceeded as error:
        raise errors.MemoryExceeded(
            f"{error} (--memory here is what is left of yours: containers need "
            f"{console.size(beside_bytes)} more, for health checks"
            + (" and Valkey's 64 MB in full)" if settings.role == "main" else ")")
        ) from error
    return _manifest_of(plan), plan.memory


def _manifest_of(plan: StackPlan) -> Manifest:
    assert isinstance(plan.manifest, Manifest), "in containers a box has a store"
    return plan.manifest


def _beside_the_store(settings: ServeSettings) -> list[str]:
    """Services that are started."""
    if settings.role != "main":
        return [HELPER]
    gateway = ["gateway"] if settings.http is not None else []
    return ["compute_node", "scheduler", "valkey", *gateway]


def container_limits(
    settings: ServeSettings, plan: MemoryPlan, segment_bytes: int
) -> dict[str, int]:
    """Memory limit in bytes by container that the compose file names. The segment is charged to the
    store: it touches it first.
    """
    parts = plan.parts
    node_bytes = sum(parts.get(name, 0) for name in _NODE_PARTS)
    store = {"expert_store": segment_bytes + STORE_ROOM_BYTES}
    if settings.role != "main":
        return store | {HELPER: node_bytes + _ROOM_BYTES[HELPER]}
    return store | {
        "valkey": parts["valkey"] + _ROOM_BYTES["valkey"],
        "compute_node": node_bytes + _ROOM_BYTES["compute_node"],
        "scheduler": parts["scheduler"] + _ROOM_BYTES["scheduler"],
        "gateway": OVERHEAD_BYTES["gateway"] + _ROOM_BYTES["gateway"],
    }
