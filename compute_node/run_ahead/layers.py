"""A model's decoder layers, which keep what they gave to the true pass of a token, so that a second
pass of it need not compute them again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_STATE_ARGUMENTS = {"past_key_values", "past_key_value", "cache_params", "layer_past", "cache"}

Forward = Callable[..., Any]


class Second(Protocol):
    """A second pass.

    stalled: the layer whose experts the true pass awaits; layers before it are not computed again
    """

    stalled: int

    def enter(self, number: int) -> None:
        """A layer is computed next."""

    def leave(self, number: int) -> None:
        """A layer was computed."""

    def skip(self, number: int) -> None:
        """A layer gives what it gave to the true pass."""

    def pause_if_due(self) -> None:
        """Before attention."""


class DecoderLayers:
    """Of one model. One thread.

    are_found: the list of them
    keeps:  whether the pass that runs is a true one that a second one may follow
    second: the second pass, while it runs
    """

    def __init__(self) -> None:
        self.are_found = False
        self.keeps = False
        self.second: Second | None = None
        self._outputs: dict[int, Any] = {}  # of layers, this token's
        self._mixed: dict[nn.Module, Any] = {}  # of attention and its like, this token's

    def watch(self, model: nn.Module, experts: Mapping[int, nn.Module]) -> None:
        """Look for the list of layers. experts: modules by model layer number"""
        layers = _layers(model, experts)
        self.are_found = layers is not None
        for number, layer in enumerate(layers or ()):
            _replace_forward(layer, self._keeping(number, layer.forward))
            for mixer in _mixers(layer):
                _replace_forward(mixer, self._mixing(number, mixer, mixer.forward))

    def forget(self) -> None:
        """The token's true pass is over."""
        self.keeps = False
        self._outputs.clear()
        self._mixed.clear()

    def _keeping(self, number: int, forward: Forward) -> Forward:
        def keeping(*args: Any, **kwargs: Any) -> Any:
            second = self.second
            if second is None:
                output = forward(*args, **kwargs)
                if self.keeps:
                    self._outputs[number] = output
                return output
            if number < second.stalled:
                second.skip(number)
                return _cloned(self._outputs[number])
            if number > second.stalled:
                second.enter(number)
            output = forward(*args, **kwargs)
            second.leave(number)
            return output

        return keeping

    def _mixing(self, number: int, mixer: nn.Module, forward: Forward) -> Forward:
        def mixing(*args: Any, **kwargs: Any) -> Any:
            second = self.second
            if second is None:
                output = forward(*args, **kwargs)
                if self.keeps:
                    self._mixed[mixer] = output
                return output
            if number == second.stalled and mixer in self._mixed:
                return _cloned(self._mixed[mixer])
            if number == second.stalled:  # it comes after the experts
                second.enter(number)
            second.pause_if_due()
            return forward(*args, **kwargs)

        return mixing


def _layers(model: nn.Module, experts: Mapping[int, nn.Module]) -> nn.ModuleList | None:
    """The list that holds every layer with experts, by its number."""
    paths = {module: path for path, module in model.named_modules()}
    found = {paths[module].partition(f".{number}.")[0] for number, module in experts.items()}
    layers = model.get_submodule(found.pop()) if len(found) == 1 else None
    return layers if isinstance(layers, nn.ModuleList) else None


def _mixers(layer: nn.Module) -> list[nn.Module]:
    """Attention, convolution, recurrence: what is given the sequence's state."""
    return [
        child
        for child in layer.children()
        if _STATE_ARGUMENTS & inspect.signature(child.forward).parameters.keys()
    ]


def _cloned(output: Any) -> Any:
    """What reads it may write to it, as some models do to their residual stream."""
    return tree_map_only(Tensor, Tensor.clone, output)


def _replace_forward(module: nn.Module, forward: Forward) -> None:
    setattr(module, "forward", forward)  # noqa: B010  a method, to mypy
