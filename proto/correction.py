"""What a step says of experts before the scheduler has heard of it.

Advice knows the steps before. A node that has computed some layers of a step knows which experts
those used; how that changes the odds of every expert to be used after the step is learned offline
(scheduler.lab.correction_net) and kept in the forecaster's file. The node asks layer after layer,
the scheduler's shadows and replay a step at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from proto.errors import ForecasterInvalid

PREFIX = "correction."
MOST_LOG_ODDS = 30.0

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Correction:
    """Weights, float32. D the width.

    pairs:  [L, E, E], what a used expert adds to the log odds of each of its layer, itself too
    embed:  [L, E, D], what a used expert says to its own layer and to those after it
    bias:   [L, D]
    output: [L, D, E], from what the layers have said to log odds
    base:   [L, E]
    """

    pairs: Array
    embed: Array
    bias: Array
    output: Array
    base: Array

    @classmethod
    def of(cls, tensors: Mapping[str, Any]) -> Self:
        """From tensors by their names in a file."""
        return cls(*(tensors[PREFIX + each.name] for each in fields(cls)))

    def tensors(self) -> dict[str, Array]:
        """By their names in a file."""
        return {PREFIX + each.name: getattr(self, each.name) for each in fields(self)}

    def odds(self, topk_ids: NDArray[np.integer]) -> Array:
        """[L, E], by what the odds of each are multiplied once its layer's turn has come in a step
        that uses these experts, [L, K].
        """
        at = (np.arange(len(topk_ids))[:, None], topk_ids)
        said = self.embed[at].sum(axis=1).cumsum(axis=0)  # [L, D]
        heard = np.maximum(said + self.bias, 0)
        own = self.pairs[at].sum(axis=1) + self.base
        return _odds(own + np.einsum("ld,lde->le", heard, self.output))

    def layer_odds(self, layer: int, experts: list[int], said: Array) -> Array:
        """[E], the same for one layer. said: [D], the sum of what was used up to this layer."""
        heard = np.maximum(said + self.bias[layer], 0)
        own = np.add.reduce(self.pairs[layer].take(experts, axis=0)) + self.base[layer]
        return _odds(own + heard @ self.output[layer])


def _odds(log_odds: Array) -> Array:
    return np.asarray(np.exp(np.minimum(np.maximum(log_odds, -MOST_LOG_ODDS), MOST_LOG_ODDS)))


def corrected(scores: Any, odds: Any) -> Any:
    """Probabilities whose odds are multiplied by `odds`."""
    used = scores * odds
    return used / (used + (1 - scores))


def shapes(num_layers: int, num_experts: int, width: int) -> dict[str, tuple[int, ...]]:
    """Of every tensor, by its name in a file."""
    return {
        PREFIX + "pairs": (num_layers, num_experts, num_experts),
        PREFIX + "embed": (num_layers, num_experts, width),
        PREFIX + "bias": (num_layers, width),
        PREFIX + "output": (num_layers, width, num_experts),
        PREFIX + "base": (num_layers, num_experts),
    }


def load(path: Path, fingerprint: str, shape: tuple[int, int]) -> Correction:
    """From a forecaster's file, for the store and the [L, E] of this node.

    Raises ForecasterInvalid saying what is wrong and the remedy; FileNotFoundError.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            spec = json.loads((file.metadata() or {})["spec"])
            names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
        made_for = spec["fingerprint"], (spec["num_layers"], spec["num_experts"])
        want = shapes(*shape, spec["correction_width"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ForecasterInvalid.of(path, f"is damaged ({error})") from error
    if made_for != (fingerprint, shape):
        raise ForecasterInvalid.of(path, "was calibrated for another model or an earlier index")
    check(path, tensors, want)
    return Correction.of(tensors)


def check(path: Path, tensors: Mapping[str, Any], want: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ForecasterInvalid unless the tensors are those wanted, finite float32."""
    if set(tensors) != set(want):
        raise ForecasterInvalid.of(path, f"has other tensors than {', '.join(sorted(want))}")
    for name, shape in want.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != np.float32 or not np.isfinite(tensor).all():
            raise ForecasterInvalid.of(path, f"has a {name} that is not {shape} finite float32")
