"""What a model tells only when it runs: experts a token, bytes of state a token, routers that can
be recognised. One short sequence goes through weights that are all zero and take no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from proto import errors
from proto.checkpoint.sequence_state import state_bytes

_NUM_TOKENS = 64  # a pass; the second goes on where the first ended
_IMPLEMENTATION = "flashmoe_dry_run"


@dataclass(frozen=True)
class DryRun:
    """cache_bytes: of a sequence's state, KV and recurrent, after 64 and after 128 tokens

    top_k:       experts a token, by MoE layer
    unforeseen:  MoE layers whose next choice nobody can guess: their router has no weight that can
                 be asked
    """

    cache_bytes: tuple[int, int]
    top_k: dict[int, int]
    unforeseen: tuple[int, ...]

    @property
    def cache_bytes_per_token(self) -> int:
        first, second = self.cache_bytes
        return max(0, -(-(second - first) // _NUM_TOKENS))

    @property
    def cache_bytes_fixed(self) -> int:
        return max(0, self.cache_bytes[0] - _NUM_TOKENS * self.cache_bytes_per_token)


def dry_run(model: Any, experts: Mapping[int, tuple[str, Any]]) -> DryRun:
    """model: on the meta device, afterwards full of zeros; experts: path and module by MoE layer.

    Raises CheckpointUnsupported with what transformers said when it cannot run the model.
    """
    with explained(model.config.model_type):
        _fill_with_zeros(model)
    routing = {layer: _Routing(module) for layer, (_, module) in experts.items()}
    sizes = list[int]()
    with ExitStack() as stack, torch.no_grad(), explained(model.config.model_type):
        for layer, (path, _) in experts.items():
            stack.enter_context(_watching(model, path, routing[layer]))
        stack.enter_context(_skipping_experts(model))
        cache = None
        for _ in range(2):
            ids = torch.zeros(1, _NUM_TOKENS, dtype=torch.long)
            cache = model.base_model(ids, use_cache=True, past_key_values=cache).past_key_values
            sizes.append(state_bytes(cache))
    return DryRun(
        cache_bytes=(sizes[0], sizes[1]),
        top_k={layer: found.top_k for layer, found in routing.items()},
        unforeseen=tuple(layer for layer, found in routing.items() if not found.has_router),
    )


@contextmanager
def explained(model_type: str) -> Iterator[None]:
    """For what transformers does with a model. Raises CheckpointUnsupported with what it said."""
    try:
        yield
    except Exception as error:  # whatever transformers and torch raise for values of the wrong kind
        words = str(error).strip().splitlines() or [""]
        if isinstance(error, LookupError) or not words[0]:  # which say but a name, or nothing
            words = [f"{type(error).__name__} {words[0]}".strip()]
        raise errors.CheckpointUnsupported(
            f"transformers cannot run this {model_type} model ({words[0][:200]}): "
            "check config.json, or try another release of transformers"
        ) from error


def _fill_with_zeros(model: Any) -> None:
    """Every weight becomes one zero, seen as often as its shape needs; what is made from the config
    (position tables) gets its values.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            module._parameters[name] = filled = nn.Parameter(zeros, requires_grad=False)
            filled._is_hf_initialized = True  # type: ignore[attr-defined]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    model._initialize_missing_keys(False)


@dataclass
class _Routing:
    """What is seen of one MoE layer. scored: modules that returned a number for each expert."""

    experts: Any
    top_k: int = 0
    scored: list[Any] = field(default_factory=list)
    has_router: bool = False

    def saw(self, module: Any, _: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and first.dim() and first.shape[-1] == self.num_experts:
            self.scored.append(module)

    def arrived(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, topk_ids, _ = (*args, *kwargs.values())
        self.top_k = int(topk_ids.shape[-1])
        shape = (self.num_experts, hidden.shape[-1])
        weights = (getattr(module, "weight", None) for module in self.scored)
        self.has_router = any(w is not None and w.shape == shape for w in weights)

    @property
    def num_experts(self) -> int:
        return int(self.experts.num_experts)


@contextmanager
def _watching(model: Any, path: str, routing: _Routing) -> Iterator[None]:
    block = model.get_submodule(path.rpartition(".")[0])
    hooks = [routing.experts.register_forward_pre_hook(routing.arrived, with_kwargs=True)]
    hooks += [
        module.register_forward_hook(routing.saw)
        for module in block.modules()
        if module is not block and module is not routing.experts
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _skipping_experts(model: Any) -> Iterator[None]:
    def skip(module: Any, hidden_states: Any, *_: Any) -> Any:
        return torch.zeros_like(hidden_states)

    ALL_EXPERTS_FUNCTIONS[_IMPLEMENTATION] = skip
    previous = model.config._experts_implementation
    model.set_experts_implementation(_IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_experts_implementation(previous)
