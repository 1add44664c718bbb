"""Splits the memory ceiling into parts at start: what is left for expert slots, and whether it
is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deploy.plan.mebibytes import mib
from deploy.plan.parts import (
    fixed_parts,
    grammar_bytes,
    lending_parts,
    of_a_helper,
    tokenizer_bytes,
)
from deploy.plan.store_facts import StoreFacts
from deploy.settings import Role, parse_experts_memory
from proto import errors
from proto.expert import ModelSpec

_STATES = (8, 4, 2)  # sequences at their longest that there is room for, by default, ...
_STATES_SHARE = 1 / 16  # ... of what experts would have else; at least one

_LEAST_BYTES = 1 << 30  # taken for what is left where no ceiling is given


@dataclass(frozen=True)
class MemoryPlan:
    """parts: bytes by part, summing to total_bytes

    spare_bytes: slots beside those that nodes may borrow, for reads under way
    lent_bytes: slots beside both, for what is on its way to other boxes
    is_borrowed: the store is another box's, and slots are the worker's own memory
    smallest_bytes: the ceiling below which the model cannot be served
    warnings: what to know of it, a sentence each
    """

    ceiling_bytes: int
    parts: dict[str, int]
    slot_bytes: int
    num_experts: int
    spare_bytes: int
    smallest_bytes: int
    warnings: tuple[str, ...] = ()
    lent_bytes: int = 0
    is_borrowed: bool = False

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def experts_bytes(self) -> int:
        """Of slots that nodes may borrow."""
        return self.parts["experts"]

    @property
    def slots(self) -> int:
        """Experts that can be resident."""
        return self.experts_bytes // self.slot_bytes

    @property
    def spare_slots(self) -> int:
        return self.spare_bytes // self.slot_bytes

    @property
    def lent_slots(self) -> int:
        return self.lent_bytes // self.slot_bytes

    @property
    def shared_bytes(self) -> int:
        """Of the segment."""
        if self.is_borrowed:
            return 0
        return self.experts_bytes + self.parts["spare_slots"] + self.lent_bytes


def plan_memory(
    manifest: StoreFacts,
    memory_bytes: int | None,
    experts_memory: str | None,
    *,
    context_tokens: int,
    chunk_tokens: int,
    spare_bytes: int,
    embedded_valkey: bool = True,
    serves_http: bool = False,
    forecaster_bytes: int = 0,
    router_map_bytes: int = 0,
    vocabulary_bytes: int = 0,
    kv_memory_bytes: int | None = None,
    role: Role = "main",
    lent_bytes: int = 0,
    is_borrowed: bool = False,
) -> MemoryPlan:
    """Where the memory goes.

    kv_memory_bytes: of the state of requests that run, and of prompts that are kept; None: see
    `default_kv_bytes`

    forecaster_bytes: what a calibration adds to the scheduler, see `forecaster_room`
    router_map_bytes: the same to the node, see `router_map_room`
    vocabulary_bytes: of the tokenizer's file
    role: of the box
    lent_bytes, is_borrowed: as of a plan; only a worker's store may be another box's
    memory_bytes: the ceiling; None: what experts_memory needs
    Raises MemoryExceeded, naming what would be enough, when the ceiling cannot be kept;
    ConfigInvalid.
    """
    spec, slot_bytes = manifest.spec, manifest.slot_bytes
    parts = fixed_parts(
        manifest, context_tokens, chunk_tokens, spare_bytes, embedded_valkey, serves_http
    ) | lending_parts(lent_bytes)
    parts["scheduler"] += forecaster_bytes
    parts["compute_node"] += router_map_bytes
    all_bytes = manifest.num_experts * slot_bytes
    least_bytes = min(_least_slots(role, spec), manifest.num_experts) * slot_bytes
    longest_bytes = longest_state_bytes(manifest, context_tokens)
    if kv_memory_bytes is not None:
        _check_kv(kv_memory_bytes, longest_bytes, context_tokens)
    parts["grammar"] = grammar_bytes(vocabulary_bytes)
    parts["kv_cache"] = longest_bytes if kv_memory_bytes is None else kv_memory_bytes
    parts["tokenizer"] = tokenizer_bytes(vocabulary_bytes, parts)
    smallest_bytes = sum(parts.values()) + least_bytes
    if role != "main":
        parts = of_a_helper(role, parts, is_borrowed)
        smallest_bytes = sum(parts.values()) + least_bytes
    elif kv_memory_bytes is None:
        left_bytes = max(all_bytes, _LEAST_BYTES)
        if memory_bytes is not None:
            left_bytes = memory_bytes - smallest_bytes
        parts["kv_cache"] = default_kv_bytes(longest_bytes, left_bytes)
        parts["tokenizer"] = tokenizer_bytes(vocabulary_bytes, parts)
    fixed = sum(parts.values())
    if experts_memory is not None:
        wanted_bytes = parse_experts_memory(experts_memory, manifest.num_experts, slot_bytes)
    elif memory_bytes is not None:
        wanted_bytes = (memory_bytes - fixed) // slot_bytes * slot_bytes
    else:
        raise errors.ConfigInvalid("give --memory (for example 2GiB) or --experts-memory")
    parts["experts"] = min(wanted_bytes, all_bytes)
    plan = MemoryPlan(
        memory_bytes or fixed + parts["experts"],
        parts,
        slot_bytes,
        manifest.num_experts,
        spare_bytes,
        smallest_bytes,
        tuple(_beyond_training(context_tokens, manifest.sizing.max_position_embeddings)),
        lent_bytes,
        is_borrowed,
    )
    _check_experts(plan, role, least_bytes, memory_bytes, experts_memory)
    if plan.total_bytes > plan.ceiling_bytes:
        raise errors.MemoryExceeded(
            f"{plan.slots} expert slots need {mib(plan.total_bytes)} in all, --memory is "
            f"{mib(plan.ceiling_bytes)}: give fewer experts memory or a higher ceiling"
        )
    return plan


def longest_state_bytes(manifest: StoreFacts, context_tokens: int) -> int:
    """Of a sequence at its longest: KV, recurrent and convolution states."""
    sizing = manifest.sizing
    return sizing.cache_bytes_fixed + sizing.cache_bytes_per_token * context_tokens


def default_kv_bytes(longest_bytes: int, left_bytes: int) -> int:
    """For eight sequences at their longest, or fewer where that is a large share of what experts
    would have else.
    """
    fitting = (n for n in _STATES if n * longest_bytes <= left_bytes * _STATES_SHARE)
    return next(fitting, 1) * longest_bytes


def _check_kv(kv_memory_bytes: int, longest_bytes: int, context_tokens: int) -> None:
    """Raises ConfigInvalid where a request at its longest would never fit."""
    if kv_memory_bytes < longest_bytes:
        raise errors.ConfigInvalid(
            f"kv_memory {mib(kv_memory_bytes)} cannot hold one sequence of max_context_tokens = "
            f"{context_tokens}: give at least {mib(longest_bytes)}, or shorten the context"
        )


def _beyond_training(context_tokens: int, trained_tokens: int) -> Iterator[str]:
    if 0 < trained_tokens < context_tokens:
        yield (
            f"max_context_tokens is {context_tokens:,}, the model was trained for "
            f"{trained_tokens:,}: what goes beyond may be nonsense"
        )


def _least_slots(role: Role, spec: ModelSpec) -> int:
    """A token's experts; on a worker one layer's; on a shadow, which may wait for nothing, all."""
    if role == "shadow":
        return spec.num_experts_total
    return spec.top_k * (1 if role == "worker" else len(spec.moe_layers))


def _check_experts(
    plan: MemoryPlan,
    role: Role,
    least_bytes: int,
    memory_bytes: int | None,
    experts_memory: str | None,
) -> None:
    """Raises MemoryExceeded when what has to fit, least_bytes, does not."""
    if plan.experts_bytes >= least_bytes:
        return
    if role == "shadow":
        raise errors.MemoryExceeded(
            f"a shadow holds all {plan.num_experts} experts: give it {mib(plan.smallest_bytes)}, "
            "or a store that `flashmoe pack` wrote in fewer bits"
        )
    if experts_memory is not None:
        smallest = least_bytes // plan.slot_bytes
        raise errors.MemoryExceeded(
            f"--experts-memory {experts_memory} is {max(0, plan.slots)} slots, one token needs "
            f"{smallest}: give at least {smallest}"
        )
    raise errors.MemoryExceeded(
        f"--memory {mib(memory_bytes or 0)} does not fit this model: the smallest that works is "
        f"{mib(plan.smallest_bytes)}"
    )
