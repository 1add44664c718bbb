"""A forecaster trained ahead (scheduler.lab.calibration), run in numpy: which experts will be used
within some horizons, from the experts that all layers chose and from every expert's own features;
the same of experts that the next step does not use; and what corrects that in a node.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from proto import correction
from proto.correction import Correction
from proto.errors import ForecasterInvalid
from scheduler.learn.recall import StepMemory

FORMAT = "flashmoe-forecaster-2"
MAX_SEQUENCES = 16  # whose recurrent state is kept

Array = NDArray[np.float32]


@dataclass(frozen=True)
class ForecasterSpec:
    """What a forecaster was made for and how. H horizons, N features.

    fingerprint:       of the store it was calibrated for; empty, of a trace alone
    horizons_steps:    [H]; output h is P(used within that many steps), output H + h P(used within
                       that many steps after the next, given that the next does not use it)
    half_lives_tokens: of the features it reads
    correction_width:  of what corrects its answers in a node
    """

    fingerprint: str
    num_layers: int
    num_experts: int
    horizons_steps: tuple[int, ...]
    half_lives_tokens: tuple[float, ...]
    feature_names: tuple[str, ...]
    width: int
    hidden: int
    correction_width: int
    trained_steps: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_layers, self.num_experts

    def check_fits(
        self,
        path: Path,
        fingerprint: str,
        shape: tuple[int, int],
        half_lives_tokens: tuple[float, ...],
    ) -> None:
        """Raises ForecasterInvalid when it was made for another store or other features."""
        if self.fingerprint != fingerprint or self.shape != shape:
            raise ForecasterInvalid.of(path, "was calibrated for another model or an earlier index")
        if self.half_lives_tokens != half_lives_tokens:
            raise ForecasterInvalid.of(
                path, f"reads half_lives_tokens {list(self.half_lives_tokens)}"
            )

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight, all float32. W the width, M the hidden units of each layer's head."""
        layers, experts = self.shape
        features, outputs, width = len(self.feature_names), 2 * len(self.horizons_steps), self.width
        return {
            "embed.weight": (layers * experts, width),
            "embed.bias": (width,),
            "gru.input": (width, 3 * width),
            "gru.input_bias": (3 * width,),
            "gru.state": (width, 3 * width),
            "gru.state_bias": (3 * width,),
            "context.weight": (width, layers * experts * outputs),
            "context.bias": (layers * experts * outputs,),
            "linear.weight": (layers, features, outputs),
            "head.input": (layers, features + outputs, self.hidden),
            "head.bias": (layers, 1, self.hidden),
            "head.output": (layers, self.hidden, outputs),
            **correction.shapes(layers, experts, self.correction_width),
        }


@dataclass(frozen=True)
class Forecaster:
    """Weights, by the names and shapes of `tensor_shapes`, and the steps it was trained on.

    remembered: [S, L, K], steps for the features to recall beside a node's own
    """

    spec: ForecasterSpec
    weights: Mapping[str, Array]
    remembered: NDArray[np.uint16]

    def correction(self) -> Correction:
        """What a node corrects its answers by."""
        return Correction.of(self.weights)

    def memory(self) -> StepMemory:
        """A memory that holds the remembered steps; to be shared and only asked."""
        memory = StepMemory(self.spec.shape, max(1, len(self.remembered)))
        for chosen in self.remembered:
            memory.append(chosen.astype(np.intp))
        return memory

    def save(self, path: Path) -> None:
        """Replace the file: after a crash the old one or the new one is there. Raises OSError."""
        temporary = path.with_name(path.name + ".tmp")
        metadata = {"format": FORMAT, "spec": json.dumps(asdict(self.spec))}
        save_file({**self.weights, "remembered": self.remembered}, temporary, metadata)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Forecaster:
        """Raises ForecasterInvalid saying what is wrong and the remedy; FileNotFoundError."""
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ForecasterInvalid.of(path, f"is damaged ({error})") from error
        if metadata.get("format") != FORMAT:
            has = metadata.get("format")
            raise ForecasterInvalid.of(path, f"has the format {has}, not {FORMAT}")
        spec = _spec(path, metadata["spec"])
        remembered = tensors.pop("remembered", None)
        correction.check(path, tensors, spec.tensor_shapes())
        _check_remembered(path, spec, remembered)
        return cls(spec, tensors, remembered)


class Forecast:
    """A forecaster at work on one node's stream. `advance` changes it, `scores` asks."""

    def __init__(self, forecaster: Forecaster) -> None:
        self._spec = forecaster.spec
        self._weights = forecaster.weights
        self._first = (np.arange(self._spec.num_layers) * self._spec.num_experts)[:, None]
        self._states: OrderedDict[str, Array] = OrderedDict()
        self._state = np.zeros(self._spec.width, np.float32)

    def advance(self, sequence: str, chosen: NDArray[np.intp]) -> None:
        """One more step of a sequence, [L, K] its experts."""
        state = self._states.pop(sequence, None)
        if state is None:
            state = np.zeros(self._spec.width, np.float32)
        self._state = self._states[sequence] = self._recur(self._embed(chosen), state)
        while len(self._states) > MAX_SEQUENCES:
            self._states.popitem(last=False)

    def scores(self, features: NDArray[Any]) -> Array:
        """[2, L, E] in [0, 1], after the last step: the mean over horizons of P(used within it),
        and the same after the next step for what that does not use.

        features: [N, L, E], in the order of the spec's feature names
        """
        weights = self._weights
        rows = features.transpose(1, 2, 0).astype(np.float32)  # [L, E, N]
        context = self._state @ weights["context.weight"] + weights["context.bias"]
        logits = rows @ weights["linear.weight"] + context.reshape(*self._spec.shape, -1)
        hidden = np.concatenate([rows, logits], axis=2) @ weights["head.input"]
        hidden = np.maximum(hidden + weights["head.bias"], 0)
        logits = logits + hidden @ weights["head.output"]
        means = _sigmoid(logits).reshape(*self._spec.shape, 2, -1).mean(axis=3)
        return np.ascontiguousarray(means.transpose(2, 0, 1))

    def _embed(self, chosen: NDArray[np.intp]) -> Array:
        rows = self._weights["embed.weight"][(self._first + chosen).ravel()]
        return np.asarray(np.maximum(rows.sum(axis=0) + self._weights["embed.bias"], 0))

    def _recur(self, embedded: Array, state: Array) -> Array:
        """A gated recurrent unit (Cho et al. 2014), in torch's variant."""
        weights, width = self._weights, self._spec.width
        given = embedded @ weights["gru.input"] + weights["gru.input_bias"]
        kept = state @ weights["gru.state"] + weights["gru.state_bias"]
        reset, update = _sigmoid(given[: 2 * width] + kept[: 2 * width]).reshape(2, width)
        candidate = np.tanh(given[2 * width :] + reset * kept[2 * width :])
        return np.asarray((1 - update) * candidate + update * state)


def _sigmoid(logits: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -30, 30))))


def _spec(path: Path, text: str) -> ForecasterSpec:
    try:
        fields = json.loads(text)
        tuples = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return ForecasterSpec(**{**fields, **tuples})
    except (ValueError, TypeError, AttributeError) as error:
        raise ForecasterInvalid.of(path, f"describes itself wrongly ({error})") from error


def _check_remembered(path: Path, spec: ForecasterSpec, remembered: Any) -> None:
    if (
        remembered is None
        or remembered.ndim != 3
        or remembered.shape[1] != spec.num_layers
        or remembered.dtype != np.uint16
        or (remembered >= spec.num_experts).any()
    ):
        raise ForecasterInvalid.of(path, "remembers steps of another model")
