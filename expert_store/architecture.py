"""What a checkpoint's model is: its experts modules and their parameters, its dense tensors, its
per-sequence state. Offline only, imports torch; the model is built on the meta device (no memory).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from expert_store import foreign
from expert_store.checkpoint import CheckpointTensor
from expert_store.parameters import ExpertParameter, ParameterSources
from proto import errors
from proto.expert import ExpertKey

_LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_TOP_K_NAMES = (
    "num_experts_per_tok",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "num_experts_per_token",
)


@dataclass(frozen=True)
class Architecture:
    """What index and pack need to know of a model."""

    model_type: str
    num_experts: int
    top_k: int
    layers: dict[int, tuple[ExpertParameter, ...]]
    dense: tuple[CheckpointTensor, ...]
    model: Any

    @property
    def keys(self) -> list[ExpertKey]:
        return [ExpertKey(layer, e) for layer in self.layers for e in range(self.num_experts)]


def load_config(root: Path) -> Any:
    """The checkpoint's config. Raises CheckpointUnsupported naming what is in the way.

    Code that comes with a checkpoint is never run: what transformers does not know is refused.
    """
    document = foreign.read_config(root)
    foreign.check_config(root, document)
    try:
        config = AutoConfig.from_pretrained(root, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever its class raises for values of the wrong kind
        raise _unreadable(root, document, error) from error
    if hasattr(config, "auto_map"):
        del config.auto_map  # the model's class would be asked for there
    if getattr(config, "quantization_config", None):
        del config.quantization_config  # the model's class is the same without it
        config.dtype = config.dtype or torch.bfloat16
    return config


def _unreadable(
    root: Path, document: Mapping[str, Any], error: Exception
) -> errors.CheckpointUnsupported:
    if "auto_map" in document and isinstance(error, ValueError):
        return errors.CheckpointUnsupported(
            f"{root}: its model type {document.get('model_type')!r} is known only to code that "
            "comes with it (auto_map), which is never run: use a checkpoint that transformers "
            "itself knows, or a newer transformers"
        )
    reason = " ".join(str(error).split("\n\n")[0].split()) or repr(error)
    return errors.CheckpointUnsupported(f"{root}: transformers cannot read its config: {reason}")


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
    sources = ParameterSources(model, tensors)
    layers = {
        layer: tuple(
            sources.expert_parameter(f"{path}.{name}", name, parameter, module.is_transposed)
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
