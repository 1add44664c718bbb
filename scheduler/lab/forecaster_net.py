"""The forecaster as torch trains it, and as numpy runs it afterwards."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from proto.correction import Correction
from scheduler.lab.calibration_settings import CalibrationSettings
from scheduler.lab.lessons import Lessons
from scheduler.learn.forecaster import Forecaster, ForecasterSpec
from scheduler.learn.recall import step_bytes
from scheduler.simulate.trace import AccessTrace

MAX_REMEMBERED_BYTES = 32 << 20  # in the scheduler; 80,000 steps of 24 x 32, 13,000 of 48 x 128


class Net(nn.Module):
    """The forecaster as torch trains it; `scheduler.learn.forecaster` runs the same in numpy."""

    def __init__(self, shape: tuple[int, int], num_features: int, how: CalibrationSettings) -> None:
        super().__init__()
        layers, experts = shape
        outputs = 2 * len(how.horizons_steps)
        self.shape = (layers, experts, outputs)
        self.embed = nn.Linear(layers * experts, how.width)
        self.gru = nn.GRU(how.width, how.width, batch_first=True)
        self.context = nn.Linear(how.width, layers * experts * outputs)
        nn.init.zeros_(self.context.weight)
        nn.init.zeros_(self.context.bias)
        self.linear = nn.Parameter(torch.zeros(layers, num_features, outputs))
        joined = num_features + outputs
        self.head_input = nn.Parameter(torch.randn(layers, joined, how.hidden) / joined**0.5)
        self.head_bias = nn.Parameter(torch.zeros(layers, 1, how.hidden))
        self.head_output = nn.Parameter(torch.zeros(layers, how.hidden, outputs))
        self.dropout = nn.Dropout(how.dropout)

    def forward(self, used: Tensor, features: Tensor) -> Tensor:
        """Logits [L, R, 2 * H] of a window's choices and features."""
        layers, experts, outputs = self.shape
        state, _ = self.gru(torch.relu(self.embed(self.dropout(used))))
        context = self.context(self.dropout(state)).view(-1, layers, experts, outputs)
        context = context.transpose(0, 1).reshape(layers, -1, outputs)
        logits = torch.baddbmm(context, features, self.linear)
        of_features, of_logits = torch.split(self.head_input, [features.shape[2], outputs], dim=1)
        hidden = torch.baddbmm(self.head_bias, features, of_features)
        hidden = torch.relu(torch.baddbmm(hidden, logits, of_logits))
        return torch.baddbmm(logits, hidden, self.head_output)


def export(
    net: Net,
    correction: Correction,
    lessons: Lessons,
    how: CalibrationSettings,
    fingerprint: str,
) -> Forecaster:
    """Weights for unscaled features, in the layout that numpy multiplies with."""
    trace = lessons.trace
    spec = ForecasterSpec(
        fingerprint=fingerprint,
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        horizons_steps=how.horizons_steps,
        half_lives_tokens=how.half_lives_tokens,
        feature_names=lessons.names,
        width=how.width,
        hidden=how.hidden,
        correction_width=how.correction_width,
        trained_steps=trace.num_steps,
    )
    weights = {name: tensor.detach().numpy() for name, tensor in net.named_parameters()}
    exported = {
        "embed.weight": weights["embed.weight"].T,
        "embed.bias": weights["embed.bias"],
        "gru.input": weights["gru.weight_ih_l0"].T,
        "gru.input_bias": weights["gru.bias_ih_l0"],
        "gru.state": weights["gru.weight_hh_l0"].T,
        "gru.state_bias": weights["gru.bias_hh_l0"],
        "context.weight": weights["context.weight"].T,
        **_unscaled(weights, lessons.mean, lessons.std),
        "head.output": weights["head_output"],
        **correction.tensors(),
    }
    contiguous = {name: np.ascontiguousarray(value) for name, value in exported.items()}
    return Forecaster(spec, contiguous, _remembered(trace, how.seed))


def _remembered(trace: AccessTrace, seed: int) -> NDArray[np.uint16]:
    """Steps of whole generations drawn at random, as many as MAX_REMEMBERED_BYTES hold."""
    room = MAX_REMEMBERED_BYTES // step_bytes(trace.shape, trace.top_k)
    drawn = np.random.default_rng(seed).permutation(trace.num_generations)
    lengths = np.diff(trace.seq_offsets)[drawn]
    kept = np.sort(drawn[lengths.cumsum() <= room])
    ids = trace.take(kept, trace.name).topk_ids if len(kept) else trace.topk_ids[:room]
    return np.ascontiguousarray(ids, np.uint16)


def _unscaled(
    weights: dict[str, NDArray[np.float32]], mean: NDArray[np.float32], std: NDArray[np.float32]
) -> dict[str, NDArray[np.float32]]:
    """Where features enter, take over their scaling: w (x - m) / s = (w / s) x - w m / s."""
    num_features = len(mean)
    linear, head = weights["linear"], weights["head_input"]
    per_layer = linear.transpose(0, 2, 1) @ (mean / std)  # [L, H]
    bias = weights["context.bias"].reshape(len(linear), -1, linear.shape[2]) - per_layer[:, None]
    scaled_head = head[:, :num_features] / std[:, None]
    head_shift = head[:, :num_features].transpose(0, 2, 1) @ (mean / std)  # [L, M]
    return {
        "context.bias": bias.ravel(),
        "linear.weight": linear / std[:, None],
        "head.input": np.concatenate([scaled_head, head[:, num_features:]], axis=1),
        "head.bias": weights["head_bias"] - head_shift[:, None],
    }
