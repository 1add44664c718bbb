"""How transformers maps a checkpoint's names to module parameters; offline only, imports torch.

The model is built on the meta device (no memory), and transformers' own conversion table is asked
for every tensor.
Three shapes of an expert parameter can be read in place: stored fused, one tensor an expert, or
one tensor
an expert for each of several parts laid one after another (gate and up).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from expert_store.checkpoint import CheckpointTensor
from proto import errors

_LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_TOP_K_NAMES = (
    "num_experts_per_tok",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "num_experts_per_token",
)
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True, slots=True)
class Part:
    """A byte range of one checkpoint tensor: all of it, or one expert's slice of a fused one."""

    tensor: CheckpointTensor
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True)
class ExpertParameter:
    """One parameter of an experts module. parts[e]: what makes up expert e's slice, in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Part, ...], ...]


@dataclass(frozen=True)
class Architecture:
    """What index and pack need to know of a model."""

    model_type: str
    num_experts: int
    top_k: int
    layers: dict[int, tuple[ExpertParameter, ...]]
    dense: tuple[CheckpointTensor, ...]
    model: Any


def load_config(root: Path) -> Any:
    """The checkpoint's config. Raises CheckpointUnsupported naming what is in the way."""
    try:
        config = AutoConfig.from_pretrained(root)
    except (OSError, ValueError, KeyError) as error:
        raise errors.CheckpointUnsupported(
            f"{root}: transformers cannot read its config: {error}"
        ) from error
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = (
            quantization.get("quant_method", "unknown")
            if isinstance(quantization, dict)
            else quantization
        )
        raise errors.CheckpointUnsupported(
            f"{root}: its weights are quantised on disk ({method}), which is not supported: "
            "use a bf16, fp16 or fp32 checkpoint"
        )
    return config


def build_meta(config: Any) -> Any:
    """The model without memory. Raises CheckpointUnsupported when it is no causal language model
    of transformers.
    """
    dtype = config.dtype or torch.float32
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise errors.CheckpointUnsupported(
            f"architecture {config.model_type!r} is no causal language model of transformers"
        ) from error
    return model.eval()


def experts_modules(model: Any) -> dict[int, tuple[str, Any]]:
    """Model layer number -> (path, experts module), for modules on transformers' experts interface.

    Raises CheckpointUnsupported naming the architecture when there is none.
    """
    found: dict[int, tuple[str, Any]] = {}
    for path, module in model.named_modules():
        if not (hasattr(module, "is_transposed") and hasattr(module, "has_gate")):
            continue
        match = _LAYER_NUMBER.search(path)
        if match is None or int(match[1]) in found:
            raise errors.CheckpointUnsupported(
                f"experts at {path!r} belong to no layer of their own"
            )
        if module.has_post_expert_norm:
            raise errors.CheckpointUnsupported(
                f"{type(module).__name__} has a norm after each expert"
            )
        found[int(match[1])] = (path, module)
    if not found:
        raise errors.CheckpointUnsupported(
            f"architecture {model.config.model_type!r} has no experts on transformers' experts "
            "interface"
        )
    return dict(sorted(found.items()))


def expert_parameters(module: Any) -> dict[str, Any]:
    """The parameters of an experts module that have one slice an expert."""
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.shape[0] == module.num_experts
    }


def read_architecture(root: Path, tensors: Mapping[str, CheckpointTensor]) -> Architecture:
    """Map every checkpoint tensor to an expert's slice or to the dense part.

    Raises CheckpointUnsupported naming the architecture, the conversion or the dtype in the way.
    """
    config = load_config(root)
    model = build_meta(config)
    modules = experts_modules(model)
    sources = _Sources(model, tensors)
    layers = {
        layer: tuple(
            sources.expert_parameter(f"{path}.{name}", name, parameter)
            for name, parameter in expert_parameters(module).items()
        )
        for layer, (path, module) in modules.items()
    }
    counts = {module.num_experts for _, module in modules.values()}
    if len(counts) != 1:
        raise errors.CheckpointUnsupported(
            f"its layers have different numbers of experts: {counts}"
        )
    return Architecture(
        model_type=config.model_type,
        num_experts=counts.pop(),
        top_k=_top_k(model),
        layers=layers,
        dense=sources.dense(),
        model=model,
    )


def _top_k(model: Any) -> int:
    config = model.config.get_text_config()
    for name in _TOP_K_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise errors.CheckpointUnsupported(
        f"{config.model_type}: its config does not say how many experts a token uses"
    )


class _Sources:
    """Which checkpoint tensors make up which parameter, by transformers' conversion table."""

    def __init__(self, model: Any, tensors: Mapping[str, CheckpointTensor]) -> None:
        mapping = get_model_conversion_mapping(model)
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        state = model.state_dict()
        self._by_target: dict[str, list[tuple[CheckpointTensor, str | None]]] = {}
        for name, tensor in tensors.items():
            target, pattern = rename_source_key(
                name, renamings, self._converters, model.base_model_prefix, state
            )
            if target not in state and name in state:
                target, pattern = name, None
            self._by_target.setdefault(target, []).append((tensor, pattern))
        self._taken: set[str] = set()

    def expert_parameter(self, target: str, name: str, parameter: Any) -> ExpertParameter:
        found = self._by_target.get(target)
        if not found:
            raise errors.CheckpointUnsupported(f"the checkpoint has no tensor for {target}")
        self._taken.add(target)
        num_experts, shape = parameter.shape[0], tuple(parameter.shape[1:])
        if found[0][1] is None:
            parts = _slice_fused(found[0][0], num_experts, tuple(parameter.shape), target)
        else:
            parts = self._gather(found, num_experts, target)
        self._check(target, parts, parameter)
        return ExpertParameter(name, _DTYPES[parameter.dtype], shape, parts)

    def dense(self) -> tuple[CheckpointTensor, ...]:
        return tuple(
            tensor
            for target, found in self._by_target.items()
            if target not in self._taken
            for tensor, _ in found
        )

    def _gather(
        self, found: list[tuple[CheckpointTensor, str | None]], num_experts: int, target: str
    ) -> tuple[tuple[Part, ...], ...]:
        """One tensor an expert and pattern; patterns follow one another inside an expert."""
        converter = next(c for c in self._converters if found[0][1] in c.source_patterns)
        _check_operations(converter, target)
        by_pattern: dict[str, list[CheckpointTensor]] = {p: [] for p in converter.source_patterns}
        for tensor, pattern in found:
            by_pattern[str(pattern)].append(tensor)
        for pattern, tensors in by_pattern.items():
            if len(tensors) != num_experts:
                raise errors.CheckpointUnsupported(
                    f"{target} needs {num_experts} tensors like {pattern}, the checkpoint has "
                    f"{len(tensors)}"
                )
            tensors.sort(key=lambda tensor: _natural(tensor.name))
        return tuple(
            tuple(
                Part(tensors[e], tensors[e].offset_bytes, tensors[e].length_bytes)
                for tensors in by_pattern.values()
            )
            for e in range(num_experts)
        )

    def _check(self, target: str, parts: tuple[tuple[Part, ...], ...], parameter: Any) -> None:
        want_bytes = parameter[0].numel() * parameter.element_size()
        for expert, expert_parts in enumerate(parts):
            for part in expert_parts:
                if part.tensor.dtype != _DTYPES.get(parameter.dtype):
                    raise errors.CheckpointUnsupported(
                        f"{part.tensor.name} is {part.tensor.dtype} on disk, but the config's "
                        "dtype is "
                        f"{parameter.dtype}: save the checkpoint again in one dtype"
                    )
            if sum(part.length_bytes for part in expert_parts) != want_bytes:
                raise errors.CheckpointUnsupported(
                    f"expert {expert} of {target} has the wrong size on disk"
                )


def _check_operations(converter: Any, target: str) -> None:
    kinds = [type(operation) for operation in converter.operations]
    stacked = kinds and kinds[0] is MergeModulelist and converter.operations[0].dim == 0
    joined = kinds[1:] == [] or (kinds[1:] == [Concatenate] and converter.operations[1].dim == 1)
    if not (stacked and joined):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise errors.CheckpointUnsupported(
            f"{target} needs a conversion that cannot be read in place ({names}): "
            "save the checkpoint again with transformers' save_pretrained"
        )


def _slice_fused(
    tensor: CheckpointTensor, num_experts: int, shape: tuple[int, ...], target: str
) -> tuple[tuple[Part, ...], ...]:
    if tensor.shape != shape:
        raise errors.CheckpointUnsupported(f"{target} has shape {shape}, on disk {tensor.shape}")
    stride = tensor.length_bytes // num_experts
    return tuple(
        (Part(tensor, tensor.offset_bytes + e * stride, stride),) for e in range(num_experts)
    )


def _natural(name: str) -> list[Any]:
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]


def cache_bytes(model: Any, num_tokens: int) -> int:
    """Bytes of per-sequence state (KV, recurrent) after `num_tokens`, from a forward pass without
    memory.

    model: on the meta device
    """

    def skip(module: Any, hidden_states: Any, *_: Any) -> Any:
        return torch.empty_like(hidden_states)

    ALL_EXPERTS_FUNCTIONS["flashmoe_meta"] = skip
    previous = model.config._experts_implementation
    model.set_experts_implementation("flashmoe_meta")
    try:
        with torch.no_grad():
            ids = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
            output = model(ids, use_cache=True, logits_to_keep=1)
    finally:
        model.set_experts_implementation(previous)
    return sum(t.numel() * t.element_size() for t in cache_tensors(output.past_key_values))


def cache_tensors(cache: Any) -> list[Any]:
    """Every tensor a transformers cache holds, once."""
    seen: dict[int, Any] = {}
    pending: list[Any] = [vars(layer) for layer in cache.layers]
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            seen[id(value)] = value
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple)):
            pending.extend(value)
    return list(seen.values())
