"""What a checkpoint's model is: its experts modules and their parameters, its dense tensors, what a
dry run of it tells. Offline only, imports torch; the model's weights take no memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from expert_store.offline.checkpoint import foreign
from expert_store.offline.checkpoint.dry_run import DryRun, dry_run, explained
from expert_store.offline.checkpoint.files import CheckpointTensor
from expert_store.offline.checkpoint.parameters import (
    EXPERT_DTYPES,
    ExpertParameter,
    ParameterSources,
)
from proto import errors
from proto.expert import ExpertKey

_LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Architecture:
    """What index and pack need to know of a model.

    dense:   what the model takes besides its experts; skipped: what it does not take (other heads,
             layers that only training uses)
    dry_run: what was seen when the model ran
    """

    model_type: str
    num_experts: int
    top_k: int
    layers: dict[int, tuple[ExpertParameter, ...]]
    dense: tuple[CheckpointTensor, ...]
    skipped: tuple[CheckpointTensor, ...]
    dry_run: DryRun
    model: Any

    @property
    def keys(self) -> list[ExpertKey]:
        return [ExpertKey(layer, e) for layer in self.layers for e in range(self.num_experts)]

    @property
    def matrices(self) -> list[ExpertParameter]:
        return [p for layer in self.layers.values() for p in layer if p.is_matrix]


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
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise errors.CheckpointUnsupported(
            f"architecture {config.model_type!r} is no causal language model of transformers"
        )
    with explained(config.model_type), torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
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
    is_said = config.dtype is not None
    config.dtype = config.dtype or weights_dtype(tensors.values())
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
    dense = sources.dense()
    if not is_said and weights_dtype(dense) != config.dtype:  # which the node would take
        raise errors.CheckpointUnsupported(
            f'{root}: its config names no dtype and its weights have several: add "dtype" to '
            "config.json"
        )
    found = dry_run(model, modules)
    return Architecture(
        model_type=config.model_type,
        num_experts=counts.pop(),
        top_k=_same_top_k(found),
        layers=layers,
        dense=dense,
        skipped=sources.skipped(),
        dry_run=found,
        model=model,
    )


def weights_dtype(tensors: Iterable[CheckpointTensor]) -> torch.dtype:
    """Of the first floating-point tensor: what transformers takes where the config says nothing."""
    found = (EXPERT_DTYPES[t.dtype] for t in tensors if t.dtype in EXPERT_DTYPES)
    return next(found, torch.float32)


def _same_top_k(found: DryRun) -> int:
    counts = set(found.top_k.values())
    if len(counts) != 1:
        raise errors.CheckpointUnsupported(
            "its layers use different numbers of experts a token, which is not supported: "
            + ", ".join(f"layer {layer}: {k}" for layer, k in found.top_k.items())
        )
    return counts.pop()


def remarks(architecture: Architecture) -> list[str]:
    """What its user should know: a sentence each."""
    return [*_about_skipped(architecture.skipped), *_about_routers(architecture.dry_run)]


def _about_skipped(skipped: Sequence[CheckpointTensor]) -> Iterator[str]:
    if not skipped:
        return
    names = sorted(tensor.name for tensor in skipped)
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    mib = sum(tensor.length_bytes for tensor in skipped) / (1 << 20)
    yield (
        f"skipped {len(names)} tensors ({mib:.1f} MiB) that this model does not use: "
        f"{', '.join(names[:2])}{more}"
    )


def _about_routers(found: DryRun) -> Iterator[str]:
    if found.unforeseen:
        layers = ", ".join(map(str, found.unforeseen))
        yield (
            f"experts of layers {layers} are computed exactly but not read ahead: their routers "
            "have no weight that can be asked early"
        )
