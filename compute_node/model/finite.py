"""Whether a model's numbers are numbers; and once they are not, where that began."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from compute_node.moe.layer import RoutedExperts
from proto import errors
from proto.expert import ExpertKey


def is_usable(logits: Tensor) -> bool:
    """Whether a token can be chosen: none is NaN or positive infinity, some are finite; a model may
    give minus infinity to tokens that must not come. logits: [1, V]
    """
    return bool(logits.max().isfinite())  # NaN is the maximum of whatever holds it


def fault_of(model: nn.Module, again: Callable[[], object]) -> errors.NotFinite:
    """The error that names what first made numbers that are not finite of finite ones.

    again: computes the model's faulty pass once more; what it raises is raised
    """
    try:
        with _watching(model):
            again()
    except errors.NotFinite as found:
        return found
    return errors.NotFinite(
        "the model's logits are NaN or infinite, and no module of it makes such numbers when they "
        "are computed again: retry, and run `flashmoe verify` if it stays so"
    )


@contextlib.contextmanager
def _watching(model: nn.Module) -> Iterator[None]:
    """Raises NotFinite as soon as a module returns such numbers; the innermost comes first."""
    hooks = []
    for path, module in model.named_modules():
        kind = f"{path or 'model'} ({type(module).__name__})"
        hooks.append(module.register_forward_hook(_raiser(kind)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _raiser(kind: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def check(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not all(_is_finite(tensor) for tensor in _floats(output)):
            raise errors.NotFinite(
                f"the model's numbers become NaN or infinite in {kind}{_cause(module, inputs)}: "
                "`flashmoe verify` tells whether the checkpoint is as it was indexed; if it is, "
                "convert it to bfloat16 or ask its maker"
            )

    return check


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _floats(output: Any) -> list[Tensor]:
    parts = output if isinstance(output, (tuple, list)) else [output]
    return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]


def _cause(module: nn.Module, inputs: tuple[Any, ...]) -> str:
    """What is wrong with it, where that is to be seen."""
    routed = getattr(module, "flashmoe", None)
    if isinstance(routed, RoutedExperts):
        return f", expert {_faulty_expert(module, routed, *inputs)}"
    for name, parameter in module.named_parameters(recurse=False):
        if not parameter.is_meta and not _is_finite(parameter):
            return f", whose {name} holds such numbers"
    return ""


def _faulty_expert(
    module: Any, routed: RoutedExperts, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> ExpertKey | str:
    """The first that makes them alone."""
    for expert in sorted(set(topk_ids.flatten().tolist())):
        others = topk_ids.masked_fill(topk_ids != expert, module.num_experts)
        if not _is_finite(routed.forward(module, hidden, others, topk_weights)):
            return ExpertKey(routed.layer, expert)
    return "unknown"
