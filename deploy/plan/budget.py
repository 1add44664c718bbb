"""Splits the memory ceiling into parts at start: what is left for expert slots, and whether it
is enough.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import psutil

from deploy.plan import cgroup
from deploy.settings import Role, parse_experts_memory
from expert_store.manifest.manifest import Manifest
from proto import errors
from proto.expert import DTYPE_BYTES, ModelSpec
from proto.weight_format import EXACT

MIB = 1024 * 1024

# PSS of each process beside weights and buffers, measured on an idle stack with room for what
# they grow by under load (tests/bench/LOG.md has the figures).
OVERHEAD_BYTES = {
    "compute_node": 320 * MIB,
    "expert_store": 42 * MIB,
    "scheduler": 80 * MIB,
    "launcher": 52 * MIB,
    "valkey": 16 * MIB,
    "gateway": 60 * MIB,
    "worker": 300 * MIB,
    "shadow": 320 * MIB,
}
_HELPERS = ("worker", "shadow")
_OF_A_HELPER = ("expert_store", "launcher")


_STATES = (8, 4, 2)  # sequences at their longest that there is room for, by default, ...
_STATES_SHARE = 1 / 16  # ... of what experts would have else; at least one

_LEAST_BYTES = 1 << 30  # taken for what is left where no ceiling is given


# Of its file, measured with 50, 150 and 200 thousand tokens: once it is loaded, and while it is.
_TOKENIZER_TIMES = 4, 14
# Measured with 8 and 151 thousand tokens: a library and some answers, and of the tokenizer's file.
_GRAMMAR_BYTES, _GRAMMAR_TIMES = 12 * MIB, 4


@dataclass(frozen=True)
class MemoryPlan:
    """parts: bytes by part, summing to total_bytes

    spare_bytes: slots beside those that nodes may borrow, for reads under way
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


def plan_memory(
    manifest: Manifest,
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
) -> MemoryPlan:
    """Where the memory goes.

    kv_memory_bytes: of the state of requests that run, and of prompts that are kept; None: see
    `default_kv_bytes`

    forecaster_bytes: what a calibration adds to the scheduler, see `forecaster_room`
    router_map_bytes: the same to the node, see `router_map_room`
    vocabulary_bytes: of the tokenizer's file
    role: of the box
    memory_bytes: the ceiling; None: what experts_memory needs
    Raises MemoryExceeded, naming what would be enough, when the ceiling cannot be kept;
    ConfigInvalid.
    """
    spec, slot_bytes = manifest.spec, manifest.slot_bytes
    parts = _fixed_parts(
        manifest, context_tokens, chunk_tokens, spare_bytes, embedded_valkey, serves_http
    )
    parts["scheduler"] += forecaster_bytes
    parts["compute_node"] += router_map_bytes
    all_bytes = manifest.num_experts * slot_bytes
    least_bytes = min(_least_slots(role, spec), manifest.num_experts) * slot_bytes
    longest_bytes = longest_state_bytes(manifest, context_tokens)
    if kv_memory_bytes is not None:
        _check_kv(kv_memory_bytes, longest_bytes, context_tokens)
    parts["grammar"] = _grammar_bytes(vocabulary_bytes)
    parts["kv_cache"] = longest_bytes if kv_memory_bytes is None else kv_memory_bytes
    parts["tokenizer"] = _tokenizer_bytes(vocabulary_bytes, parts)
    smallest_bytes = sum(parts.values()) + least_bytes
    if role != "main":
        parts = _of_a_helper(role, parts)
        smallest_bytes = sum(parts.values()) + least_bytes
    elif kv_memory_bytes is None:
        left_bytes = max(all_bytes, _LEAST_BYTES)
        if memory_bytes is not None:
            left_bytes = memory_bytes - smallest_bytes
        parts["kv_cache"] = default_kv_bytes(longest_bytes, left_bytes)
        parts["tokenizer"] = _tokenizer_bytes(vocabulary_bytes, parts)
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
    )
    _check_experts(plan, role, least_bytes, memory_bytes, experts_memory)
    if plan.total_bytes > plan.ceiling_bytes:
        raise errors.MemoryExceeded(
            f"{plan.slots} expert slots need {_mib(plan.total_bytes)} in all, --memory is "
            f"{_mib(plan.ceiling_bytes)}: give fewer experts memory or a higher ceiling"
        )
    return plan


def _of_a_helper(role: Role, parts: dict[str, int]) -> dict[str, int]:
    """Without what only a main node has. A worker's buffers are those of a prompt's experts; a
    shadow has the dense weights and a state of its own.
    """
    needless = {*OVERHEAD_BYTES, "grammar"} - {*_OF_A_HELPER}
    if role == "worker":
        needless |= {"dense_weights", "kv_cache", "tokenizer"}
    left = {name: size for name, size in parts.items() if name not in needless}
    return {**left, role: OVERHEAD_BYTES[role]}


def longest_state_bytes(manifest: Manifest, context_tokens: int) -> int:
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
            f"kv_memory {_mib(kv_memory_bytes)} cannot hold one sequence of max_context_tokens = "
            f"{context_tokens}: give at least {_mib(longest_bytes)}, or shorten the context"
        )


def _beyond_training(context_tokens: int, trained_tokens: int) -> Iterator[str]:
    if 0 < trained_tokens < context_tokens:
        yield (
            f"max_context_tokens is {context_tokens:,}, the model was trained for "
            f"{trained_tokens:,}: what goes beyond may be nonsense"
        )


def check_machine(ceiling_bytes: int) -> None:
    """Raises MemoryExceeded when this machine or cgroup does not have so much."""
    total = psutil.virtual_memory().total
    if ceiling_bytes > total:
        raise errors.MemoryExceeded(
            f"--memory {_mib(ceiling_bytes)} is more than this machine's {_mib(total)}: lower it"
        )
    limit = cgroup.limit_bytes()
    if limit is not None and ceiling_bytes > limit:
        raise errors.MemoryExceeded(
            f"--memory {_mib(ceiling_bytes)} is above this cgroup's limit of {_mib(limit)}: "
            "lower it, or raise the limit"
        )


def check_room(plan: MemoryPlan) -> None:
    """Raises MemoryExceeded when the plan needs more memory than is available now: the kernel would
    take it from other processes, with SIGKILL.
    """
    if problem := shortage(plan):
        raise errors.MemoryExceeded(problem)
    check_shared_memory(plan)


def shortage(plan: MemoryPlan) -> str:
    """Why the plan does not fit beside what runs here now, and what would; empty when it fits."""
    launcher_bytes = plan.parts["launcher"]  # this process: it has its memory already
    fitting_bytes = cgroup.available_bytes() + launcher_bytes
    if plan.total_bytes <= fitting_bytes:
        return ""
    fact = (
        f"the stack takes {_mib(plan.total_bytes)}, and only {fitting_bytes // MIB:,} MiB are "
        "available now beside what other processes hold"
    )
    if fitting_bytes < plan.smallest_bytes:
        return f"{fact}: end some, the smallest --memory that works is {_mib(plan.smallest_bytes)}"
    return (
        f"{fact}: end some, or give --memory {fitting_bytes // MIB}MiB and no more "
        "--experts-memory than fits it"
    )


def check_shared_memory(plan: MemoryPlan) -> None:
    """Raises MemoryExceeded when /dev/shm has no room for the segment."""
    needed = plan.parts["experts"] + plan.parts["spare_slots"]
    free = shutil.disk_usage("/dev/shm").free
    if needed > free:
        raise errors.MemoryExceeded(
            f"expert slots need {_mib(needed)} of /dev/shm, which has {_mib(free)} free: mount it "
            "larger (mount -o remount,size=...), or give fewer experts memory"
        )


def forecaster_room(path: Path | None) -> int:
    """Bytes for what was calibrated, if anything: its weights, and its steps made searchable."""
    return 3 * path.stat().st_size if path else 0


def router_map_room(path: Path | None) -> int:
    """Bytes for what was learned about the routers, if anything: as it is read, and in float32."""
    return 3 * path.stat().st_size if path else 0


def _fixed_parts(
    manifest: Manifest,
    context_tokens: int,
    chunk_tokens: int,
    spare_bytes: int,
    embedded_valkey: bool,
    serves_http: bool,
) -> dict[str, int]:
    """Everything but the experts' slots."""
    spec, sizing = manifest.spec, manifest.sizing
    tensors = [tensor for layout in spec.layouts.values() for tensor in layout]
    widest = spec.weight_format.codes_per_byte * max(
        tensor.shape[-1] if len(tensor.shape) > 1 else 0 for tensor in tensors
    )
    itemsize = 4
    inner_itemsize = _own_itemsize(spec)
    overheads = dict(OVERHEAD_BYTES)
    for name in _HELPERS:
        del overheads[name]
    if not embedded_valkey:
        del overheads["valkey"]
    if not serves_http:
        del overheads["gateway"]
    return {
        "dense_weights": sizing.dense_bytes,
        "kv_cache": 0,  # decided apart
        # [T, K, D] outputs, a dozen [T, D] activations, one expert's inner activations, logits,
        # and where attention is eager its scores, their softmax and a copy
        "prefill_buffers": itemsize * chunk_tokens * sizing.hidden_size * (spec.top_k + 12)
        + inner_itemsize * chunk_tokens * widest * 6
        + itemsize * 4 * sizing.vocab_size
        + itemsize * 3 * sizing.eager_attention_heads * chunk_tokens * context_tokens
        + _dequantised_bytes(spec),
        "spare_slots": spare_bytes
        + manifest.size_classes.segment_layout(manifest.num_experts).header_bytes,
        **overheads,
    }


def _tokenizer_bytes(vocabulary_bytes: int, parts: dict[str, int]) -> int:
    """What it takes once it is loaded. While it is being loaded it takes more, in the room that
    prompts do not take yet.
    """
    unused_yet = parts["prefill_buffers"] + parts["kv_cache"]
    kept, at_most = (times * vocabulary_bytes for times in _TOKENIZER_TIMES)
    return max(kept, at_most - unused_yet)


def _grammar_bytes(vocabulary_bytes: int) -> int:
    """Of what holds answers to a grammar, from the first request that asks for it."""
    if not vocabulary_bytes:
        return 0
    return _GRAMMAR_BYTES + _GRAMMAR_TIMES * vocabulary_bytes


def _own_itemsize(spec: ModelSpec) -> int:
    """Of the model's own dtype, which low-bit records keep their scales in."""
    if spec.weight_format.name == "bf16" and spec.weight_format.lossy:
        return 4
    if spec.weight_format.name == "lossless":
        return 2
    tensors = [tensor for layout in spec.layouts.values() for tensor in layout]
    return max(2, *(DTYPE_BYTES[tensor.dtype] for tensor in tensors))


def _dequantised_bytes(spec: ModelSpec) -> int:
    """One matrix as the model's own dtype has it, and its codes one by one, while many tokens are
    multiplied with it.
    """
    if spec.weight_format == EXACT:
        return 0
    tensors = [tensor for layout in spec.layouts.values() for tensor in layout]
    weights = max(prod(t.shape) for t in tensors) * spec.weight_format.codes_per_byte
    return weights * (_own_itemsize(spec) + 1)


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
            f"a shadow holds all {plan.num_experts} experts: give it {_mib(plan.smallest_bytes)}, "
            "or a store that `flashmoe pack` wrote in fewer bits"
        )
    if experts_memory is not None:
        smallest = least_bytes // plan.slot_bytes
        raise errors.MemoryExceeded(
            f"--experts-memory {experts_memory} is {max(0, plan.slots)} slots, one token needs "
            f"{smallest}: give at least {smallest}"
        )
    raise errors.MemoryExceeded(
        f"--memory {_mib(memory_bytes or 0)} does not fit this model: the smallest that works is "
        f"{_mib(plan.smallest_bytes)}"
    )


def _mib(count: int) -> str:
    return f"{-(-count // MIB):,} MiB"
