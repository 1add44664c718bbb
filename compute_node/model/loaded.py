"""Loads the dense part of a checkpoint and hangs borrowed experts into it; experts never
materialise.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig

from compute_node.cache.expert_cache import ExpertCache
from compute_node.kernels import expert_kernels, one_token_linear, one_token_norm
from compute_node.kernels.expert_kernels import ExpertKernels
from compute_node.kernels.gate import Gates
from compute_node.kernels.prober import Prober
from compute_node.kernels.variant_kernels import VariantKernels
from compute_node.model.dense_weights import reading_dense
from compute_node.model.lookahead import NO_LOOKAHEAD, Lookahead, new_prefetcher
from compute_node.moe.backend import ExpertBackend
from compute_node.moe.first_look import FirstLook
from compute_node.moe.layer import IMPLEMENTATION, RoutedExperts, register
from compute_node.moe.local import LocalBackend
from compute_node.moe.router_watch import RouterWatch
from compute_node.predict.layer_timer import LayerTimer
from compute_node.predict.prefetcher import Prefetcher
from compute_node.store.memory import TORCH_DTYPES
from proto import errors
from proto.checkpoint.text_files import load_tokenizer
from proto.expert import EXACT_VARIANT, ModelSpec
from proto.stats import fact

logger = logging.getLogger(__name__)

Around = Callable[[int, LocalBackend], ExpertBackend]

_LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class LoadedModel:
    """A transformers model whose experts are borrowed.

    tokenizer:  None when the checkpoint has none
    first_look: None where nothing is known of embeddings
    """

    model: Any
    tokenizer: Any
    spec: ModelSpec
    routers: RouterWatch
    prefetcher: Prefetcher
    first_look: FirstLook | None
    timer: LayerTimer
    prober: Prober
    kernels: dict[int, VariantKernels]
    experts_modules: dict[int, Any]
    dense_bytes: int = fact("weights outside of experts")

    def forward(self, token_ids: Tensor, state: Any) -> Any:
        """transformers' output, with logits of the last position. token_ids: [1, T]; state: of the
        tokens before, or None
        """
        return self.model(token_ids, past_key_values=state, use_cache=True, logits_to_keep=1)

    def embedded(self, token_ids: list[int]) -> Tensor:
        """[T, D], what the first layer begins with, but for what the model makes of it there."""
        embed = self.model.get_input_embeddings()
        found: Tensor = embed(torch.tensor(token_ids))
        return found

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype


def load_model(
    model_dir: Path,
    spec: ModelSpec,
    cache: ExpertCache,
    prober: Prober,
    lookahead: Lookahead = NO_LOOKAHEAD,
    around: Around | None = None,
) -> LoadedModel:
    """Build the checkpoint's own model class around borrowed experts. Native entries are compared
    with torch unless the prober knows how that comes out. around: what computes a layer's experts,
    given its number and what computes them here; None: they are all computed here

    Raises CheckpointUnsupported, ManifestInvalid, WeightsDamaged, ConfigInvalid.
    """
    with reading_dense(model_dir, spec.dense) as dense:
        # The disk is busy while Python imports the model's class and builds it.
        model, modules = _build(model_dir, spec)
        tokenizer = _load_tokenizer(model_dir)
        _fill(model, dense())
    routers = RouterWatch()
    for layer, (path, _) in modules.items():
        routers.watch(model, layer, path)
    prefetcher = new_prefetcher(spec, cache, routers, lookahead)
    timer = LayerTimer(cache, prefetcher.computed)
    model_id = _model_id(model_dir)
    kernels = _kernels(spec, modules, Gates(prober, model_id), prober)
    for layer, (_, module) in modules.items():
        local = LocalBackend(layer, cache, prefetcher, timer, spec.small_variant)
        backend = local if around is None else around(layer, local)
        module.flashmoe = RoutedExperts(layer, kernels[layer], backend)
    register()
    model.set_experts_implementation(IMPLEMENTATION)
    _check_nothing_missing(model)
    one_token_linear.adopt(model, prober)
    one_token_norm.adopt(model, prober, model_id)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        spec=spec,
        routers=routers,
        prefetcher=prefetcher,
        first_look=FirstLook.of(prefetcher, cache, lookahead.router_map),
        timer=timer,
        prober=prober,
        kernels=kernels,
        experts_modules={layer: module for layer, (_, module) in modules.items()},
        dense_bytes=sum(_bytes(p) for p in model.parameters() if not p.is_meta),
    )


@dataclass(frozen=True)
class ExpertsOnly:
    """What computes a model's experts, without a dense weight.

    kernels: by model layer number; dtype: of activations
    """

    kernels: dict[int, VariantKernels]
    hidden_size: int
    dtype: torch.dtype


def load_experts(model_dir: Path, spec: ModelSpec, prober: Prober) -> ExpertsOnly:
    """As `load_model` computes them. Of the checkpoint only its config is read.

    Raises CheckpointUnsupported, ManifestInvalid.
    """
    model, modules = _build(model_dir, spec)
    gates = Gates(prober, _model_id(model_dir))
    hidden_size = int(model.config.get_text_config().hidden_size)
    return ExpertsOnly(_kernels(spec, modules, gates, prober), hidden_size, model.dtype)


def _model_id(model_dir: Path) -> str:
    return xxhash.xxh3_64_hexdigest((model_dir / "config.json").read_bytes())


def _build(model_dir: Path, spec: ModelSpec) -> tuple[Any, dict[int, tuple[str, Any]]]:
    """The checkpoint's own model class without a weight, and its experts modules as
    `_experts_modules` has them. Raises CheckpointUnsupported, ManifestInvalid.
    """
    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    config.dtype = config.dtype or _weights_dtype(spec)
    with _OnMeta("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=config.dtype, trust_remote_code=False
        )
    model.eval()
    modules = _experts_modules(model, spec)
    for name in (EXACT_VARIANT, *spec.variants):
        expert_kernels.check(
            spec.variant(name), {layer: module for layer, (_, module) in modules.items()}
        )
    return model, modules


def _kernels(
    spec: ModelSpec, modules: dict[int, tuple[str, Any]], gates: Gates, prober: Prober
) -> dict[int, VariantKernels]:
    """By model layer number."""

    def bind(layer: int, name: str) -> ExpertKernels:
        variant, (_, module) = spec.variant(name), modules[layer]
        layout = variant.layouts[layer]
        return expert_kernels.bind(module, variant.weight_format, layout, gates, prober)

    return {
        layer: VariantKernels(
            bind(layer, EXACT_VARIANT), {name: bind(layer, name) for name in spec.variants}
        )
        for layer in modules
    }


def _weights_dtype(spec: ModelSpec) -> torch.dtype:
    """Of the first floating-point weight: what transformers takes where the config says nothing."""
    found = (TORCH_DTYPES[t.dtype] for t in spec.dense if t.dtype in ("F32", "BF16", "F16"))
    return next(found, torch.float32)


class _OnMeta(DeviceContext):
    """Parameters without memory. Position tables are made on the CPU: a few floats, where the meta
    device would import sympy for its arange (45 MiB). What mixes them with other tables (longrope,
    proportional) goes to the meta device; `_fill` makes all of them again.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.arange:
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        if len({t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}) > 1:
            args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def _is_experts(module: Any) -> bool:
    """Whether transformers' experts interface computes the module."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def _experts_modules(model: Any, spec: ModelSpec) -> dict[int, tuple[str, Any]]:
    """Model layer number -> (path, experts module). Raises CheckpointUnsupported."""
    found = {}
    for path, module in model.named_modules():
        match = _LAYER_NUMBER.search(path)
        if match and _is_experts(module):
            found[int(match[1])] = (path, module)
    if tuple(sorted(found)) != spec.moe_layers:
        raise errors.CheckpointUnsupported(
            f"the model has experts in layers {sorted(found)}, the store in "
            f"{list(spec.moe_layers)}: "
            "index the checkpoint again"
        )
    return dict(sorted(found.items()))


def _fill(model: Any, dense: dict[str, Tensor]) -> None:
    """Load through transformers' renaming, re-create what is not stored, tie what is shared.

    dense: by checkpoint name; emptied
    """
    dtype = model.config.dtype or torch.float32
    load_config = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
    )
    info, _ = convert_and_load_state_dict_in_model(model, dense, load_config)
    dense.clear()
    borrowed = _mark_experts(model)
    not_stored = set(info.missing_keys)
    model._adjust_missing_and_unexpected_keys(info)
    missing = info.missing_keys - borrowed - set(model.all_tied_weights_keys)
    if missing or info.conversion_errors or info.mismatched_keys:
        problem = sorted(missing) or info.conversion_errors or sorted(info.mismatched_keys)
        raise errors.CheckpointUnsupported(f"the checkpoint does not fill the model: {problem}")
    model.mark_tied_weights_as_initialized(info)
    may_be_missing = not_stored - info.missing_keys
    model._move_missing_keys_from_meta_to_device(may_be_missing, {"": "cpu"}, None, None)
    model._initialize_missing_keys(False)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)


def _mark_experts(model: Any) -> set[str]:
    """Names of the experts' parameters, marked so that nobody fills them."""
    names = set()
    for path, module in model.named_modules():
        if _is_experts(module):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    parameter._is_hf_initialized = True
                    names.add(f"{path}.{name}")
    return names


def _check_nothing_missing(model: Any) -> None:
    borrowed = _mark_experts(model)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta and name not in borrowed]
    if left:
        raise errors.CheckpointUnsupported(f"weights were not loaded: {', '.join(left[:5])}")


def _load_tokenizer(model_dir: Path) -> Any:
    """None when there is no tokenizer that can be loaded: prompts are then token ids."""
    try:
        return load_tokenizer(model_dir)
    except errors.CheckpointUnsupported as error:
        logger.warning("no text, only token ids", extra={"reason": str(error)})
        return None
