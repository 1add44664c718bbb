"""What memory each container may use: its part of the plan, and room for its health check."""

from __future__ import annotations

from deploy.plan.budget import MemoryPlan
from deploy.plan.mebibytes import MIB
from deploy.plan.parts import OVERHEAD_BYTES
from deploy.settings import ServeSettings, parse_bytes
from deploy.stack.stack_plan import StackPlan
from deploy.terminal import console
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


def plan_containers(settings: ServeSettings) -> StackPlan:
    """The plan of the box, less what containers need beside it.

    Raises ConfigInvalid, and what `StackPlan.of` raises.
    """
    if settings.memory is None:
        return StackPlan.of(settings)
    room_bytes = sum(_ROOM_BYTES[name] for name in _beside_the_store(settings))
    if settings.borrows_from is None:
        room_bytes += STORE_ROOM_BYTES - OVERHEAD_BYTES["expert_store"]
    beside_bytes = room_bytes - OVERHEAD_BYTES["launcher"]
    ceiling_bytes = max(0, parse_bytes(settings.memory, "--memory") - beside_bytes)
    try:
        return StackPlan.of(settings.with_flags(memory=str(ceiling_bytes)))
    except errors.MemoryExceeded as error:
        raise errors.MemoryExceeded(
            f"{error} (--memory here is what is left of yours: containers need "
            f"{console.size(beside_bytes)} more, for health checks"
            + (" and Valkey's 64 MB in full)" if settings.role == "main" else ")")
        ) from error


def _beside_the_store(settings: ServeSettings) -> list[str]:
    """Services that are started."""
    if settings.role != "main":
        return [HELPER]
    gateway = ["gateway"] if settings.http is not None else []
    return ["compute_node", "scheduler", "valkey", *gateway]


def container_limits(
    settings: ServeSettings, plan: MemoryPlan, segment_bytes: int | None
) -> dict[str, int]:
    """Memory limit in bytes by container that the compose file names. The segment is charged to the
    store: it touches it first. segment_bytes: None: there is no store
    """
    parts = plan.parts
    node_bytes = sum(parts.get(name, 0) for name in _NODE_PARTS)
    if segment_bytes is None:
        return {HELPER: node_bytes + plan.experts_bytes + _ROOM_BYTES[HELPER]}
    store = {"expert_store": segment_bytes + STORE_ROOM_BYTES + parts.get("lending", 0)}
    if settings.role != "main":
        return store | {HELPER: node_bytes + _ROOM_BYTES[HELPER]}
    return store | {
        "valkey": parts["valkey"] + _ROOM_BYTES["valkey"],
        "compute_node": node_bytes + _ROOM_BYTES["compute_node"],
        "scheduler": parts["scheduler"] + _ROOM_BYTES["scheduler"],
        "gateway": OVERHEAD_BYTES["gateway"] + _ROOM_BYTES["gateway"],
    }
