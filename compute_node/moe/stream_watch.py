"""Recognises, when the first tokens go through, the norm whose output a layer's experts get:
what it is the norm of is the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compute_node.moe.step import current_step


@dataclass(frozen=True)
class _Normed:
    """What a module made of what. output: [T, D]"""

    module: nn.Module
    output: Tensor


@dataclass
class StreamWatch:
    """Of one MoE layer. Hands the residual stream to each decode step that runs."""

    layer: int
    _seen: list[_Normed] = field(default_factory=list)
    _hooks: list[Any] = field(default_factory=list)

    def watch(self, model: nn.Module, experts_path: str) -> None:
        """Look at what has a weight of one axis and runs in the same decoder layer."""

        # A function, because modules with hooks are copied, and it is not copied with them.
        def saw(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
                return
            if args[0].shape == output.shape:
                rows = output.detach().reshape(-1, output.shape[-1])
                self._seen.append(_Normed(module, rows))

        for module in _decoder_layer(model, experts_path).modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 1:
                self._hooks.append(module.register_forward_hook(saw))

    def forget(self) -> None:
        """A pass is through that settled nothing."""
        self._seen.clear()

    def settle(self, hidden: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The norm; None: not recognised. Looks no further. hidden: [T, D], what experts got"""
        found = next((one for one in self._seen if torch.equal(one.output, hidden)), None)
        for hook in self._hooks:
            hook.remove()
        self.forget()
        if found is None:
            return None
        module, layer = found.module, self.layer

        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            step = current_step()
            if step.batch.is_decode:
                step.streams[layer] = args[0].detach().reshape(-1, args[0].shape[-1])

        module.register_forward_pre_hook(keep)
        # Not the module itself: a question must not look like a pass to its hooks.
        return lambda stream: module.forward(stream)


def _decoder_layer(model: nn.Module, path: str) -> nn.Module:
    """The innermost of a list of modules that `path` lies in; the model, if there is no list."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            return model.get_submodule(".".join(parts[:end]))
    return model
