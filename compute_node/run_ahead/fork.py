"""A sequence's state for a second pass: what it writes leaves no trace in the true one.

A layer's state is taken from the true one when the layer is reached, and is let go of after it: so
a second pass costs the memory of one layer. Tensors are shared where transformers' cache makes new
ones as it grows; states that are written in place are cloned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

_GROWS_BY_NEW_TENSORS = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)


def can_fork(state: Any) -> bool:
    """Whether a transformers cache lies in layers."""
    return isinstance(getattr(state, "layers", None), list)


class Geometry:
    """Shapes, counters and positions of a state, without its other numbers: what masks are made
    from. Holds no memory of the state.
    """

    def __init__(self, state: Any) -> None:
        self.layers = [hollow(layer) for layer in state.layers]


class Fork:
    """state: transformers' cache, for the second pass.

    geometry: of the true state before the token that the second pass begins with
    """

    def __init__(self, true: Any, geometry: Geometry) -> None:
        self._true = true.layers
        self.state = object.__new__(type(true))
        self.state.__dict__.update(
            (name, None if name == "layers" else copied(part, Tensor.clone))
            for name, part in true.__dict__.items()
        )
        self.state.layers = list(geometry.layers)

    def enter(self, number: int) -> None:
        """Layer `number` is computed next, from the true state as it is now."""
        if number < len(self._true):
            layer = self._true[number]
            is_shared = type(layer) in _GROWS_BY_NEW_TENSORS
            self.state.layers[number] = copied(layer, _same if is_shared else Tensor.clone)

    def leave(self, number: int) -> None:
        if number < len(self.state.layers):
            self.state.layers[number] = hollow(self.state.layers[number])

    def skip(self, number: int) -> None:
        """The true pass has computed layer `number` of this token."""
        if number < len(self._true):
            self.state.layers[number] = hollow(self._true[number])


def hollow(layer: Any) -> Any:
    """A layer's state with tensors of its shapes that are one number each. Whole numbers stay: they
    are positions, which some models read before their layers.
    """
    return copied(layer, _hollowed)


def copied(
    value: Any, of_tensor: Callable[[Tensor], Tensor], made: dict[int, Any] | None = None
) -> Any:
    """Tensors by `of_tensor`, containers and objects of transformers anew, all else shared.

    made: copies by the id of what they are of
    """
    made = {} if made is None else made
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, Tensor):
        made[id(value)] = of_tensor(value)
    elif isinstance(value, dict):
        made[id(value)] = {key: copied(part, of_tensor, made) for key, part in value.items()}
    elif isinstance(value, list):
        made[id(value)] = [copied(part, of_tensor, made) for part in value]
    elif type(value).__module__.startswith("transformers.") and hasattr(value, "__dict__"):
        copy = made[id(value)] = object.__new__(type(value))
        copy.__dict__.update(
            (name, copied(part, of_tensor, made)) for name, part in value.__dict__.items()
        )
    else:
        return value
    return made[id(value)]


def _hollowed(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.new_zeros(()).expand(tensor.shape)
    return tensor.clone()


def _same(tensor: Tensor) -> Tensor:
    return tensor
