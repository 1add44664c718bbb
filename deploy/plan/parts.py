"""What a stack takes beside its experts, part by part."""

from __future__ import annotations

from math import prod
from pathlib import Path

from deploy.plan.mebibytes import MIB
from deploy.plan.store_facts import StoreFacts
from deploy.settings import Role
from proto.expert import DTYPE_BYTES, ModelSpec
from proto.weight_format import EXACT

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
LENDING_BYTES = 24 * MIB  # of an expert_store, beside slots: what it has copied and not sent yet
_HELPERS = ("worker", "shadow")
_OF_A_HELPER = ("expert_store", "launcher")

# Of its file, measured with 50, 150 and 200 thousand tokens: once it is loaded, and while it is.
_TOKENIZER_TIMES = 4, 14
# Measured with 8 and 151 thousand tokens: a library and some answers, and of the tokenizer's file.
_GRAMMAR_BYTES, _GRAMMAR_TIMES = 12 * MIB, 4


def fixed_parts(
    manifest: StoreFacts,
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


def tokenizer_bytes(vocabulary_bytes: int, parts: dict[str, int]) -> int:
    """What it takes once it is loaded. While it is being loaded it takes more, in the room that
    prompts do not take yet.
    """
    unused_yet = parts["prefill_buffers"] + parts["kv_cache"]
    kept, at_most = (times * vocabulary_bytes for times in _TOKENIZER_TIMES)
    return max(kept, at_most - unused_yet)


def grammar_bytes(vocabulary_bytes: int) -> int:
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


def lending_parts(lent_bytes: int) -> dict[str, int]:
    """Of a store that lends to other boxes. lent_bytes: slots for it; 0: it does not"""
    return {"lent_slots": lent_bytes, "lending": LENDING_BYTES} if lent_bytes else {}


def of_a_helper(role: Role, parts: dict[str, int], is_borrowed: bool) -> dict[str, int]:
    """Those of a main node without what only that has. A worker's buffers are those of a prompt's
    experts; a shadow has the dense weights and a state of its own. is_borrowed: without what only
    a box has that has a store.
    """
    needless = {*OVERHEAD_BYTES, "grammar"} - {*_OF_A_HELPER}
    if is_borrowed:
        needless |= {"expert_store", "spare_slots"}
    if role == "worker":
        needless |= {"dense_weights", "kv_cache", "tokenizer"}
    left = {name: size for name, size in parts.items() if name not in needless}
    return {**left, role: OVERHEAD_BYTES[role]}


def forecaster_room(path: Path | None) -> int:
    """Bytes for what was calibrated, if anything: its weights, and its steps made searchable."""
    return 3 * path.stat().st_size if path else 0


def router_map_room(path: Path | None) -> int:
    """Bytes for what was learned about the routers, if anything: as it is read, and in float32."""
    return 3 * path.stat().st_size if path else 0
