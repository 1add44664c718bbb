"""Trains what corrects a late forecast in the node: see proto.correction.

The forecast stays as it is; what is learned is by what the experts that a step has used so far
change its odds. The target is the share of the horizons within which an expert is used after it.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from proto.correction import Correction
from scheduler.lab.best import Best, move_average
from scheduler.lab.calibration_settings import CalibrationSettings
from scheduler.lab.lessons import Report, distances
from scheduler.simulate.trace import AccessTrace

BATCH = 512  # steps
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
DROPOUT = 0.1  # of what a step used
AVERAGE_UPDATES = 60
EVALUATE_EVERY = 50
PATIENCE = 3
LEAST_ODDS = 1e-5

Batch = tuple[Tensor, Tensor, Tensor]


class CorrectionNet(nn.Module):
    """`proto.correction.Correction` as torch trains it."""

    def __init__(self, shape: tuple[int, int], width: int) -> None:
        super().__init__()
        layers, experts = shape
        self.pairs = nn.Parameter(torch.zeros(layers, experts, experts))
        self.embed = nn.Parameter(0.3 * torch.randn(layers, experts, width))
        self.bias = nn.Parameter(torch.zeros(layers, width))
        self.output = nn.Parameter(torch.zeros(layers, width, experts))
        self.base = nn.Parameter(torch.zeros(layers, experts))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, used: Tensor) -> Tensor:
        """Log odds to add, [B, L, E], from what steps used, [B, L, E]."""
        by_layer = self.dropout(used).transpose(0, 1)
        said = torch.bmm(by_layer, self.embed).cumsum(0) + self.bias[:, None]
        own = torch.bmm(by_layer, self.pairs) + self.base[:, None]
        return torch.baddbmm(own, torch.relu(said), self.output).transpose(0, 1)

    def export(self) -> Correction:
        return Correction.of(
            {f"correction.{name}": one.detach().numpy() for name, one in self.named_parameters()}
        )


class Drills:
    """Forecasts made before steps of a trace, and what came after those steps."""

    def __init__(
        self, scores: NDArray[np.float16], trace: AccessTrace, horizons_steps: tuple[int, ...]
    ) -> None:
        self._scores = scores
        self._used = trace.used()
        self._distance = distances(self._used)
        self._horizons = horizons_steps
        self._first = trace.seq_offsets

    def steps_of(self, generations: NDArray[np.intp]) -> NDArray[np.intp]:
        """All but the first of each, before which nothing was forecast."""
        spans = [np.arange(self._first[one] + 1, self._first[one + 1]) for one in generations]
        return np.concatenate(spans)

    def batch(self, steps: NDArray[np.intp]) -> Batch:
        """Log odds forecast, what was used, and targets, all [B, L, E]."""
        scores = torch.from_numpy(self._scores[steps - 1].astype(np.float32))
        used = torch.from_numpy(self._used[steps].astype(np.float32))
        away = self._distance[steps]
        within = np.mean([away <= horizon for horizon in self._horizons], axis=0)
        return torch.logit(scores, LEAST_ODDS), used, torch.from_numpy(within.astype(np.float32))


def train_correction(
    scores: NDArray[np.float16],
    trace: AccessTrace,
    parts: tuple[NDArray[np.intp], NDArray[np.intp]],
    how: CalibrationSettings,
    report: Report,
) -> Correction:
    """Until the held-out loss has not improved for a while; returns the best average.

    scores: [T, L, E], the forecast after each step of what the next does not use
    parts:  generations to learn from and to hold out
    """
    torch.manual_seed(how.seed)
    random = np.random.default_rng(how.seed)
    drills = Drills(scores, trace, how.horizons_steps)
    to_learn, to_judge = map(drills.steps_of, parts)
    net = CorrectionNet(trace.shape, how.correction_width)
    average = copy.deepcopy(net).eval()
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    best = Best(average, PATIENCE, _judge(average, drills, to_judge))
    for update in range(1, how.correction_updates + 1):
        left = 1 - 0.9 * update / how.correction_updates
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, update / 50) * left
        loss = _loss(net, drills.batch(np.sort(random.choice(to_learn, BATCH))))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        move_average(average, net, update, AVERAGE_UPDATES)
        if update % EVALUATE_EVERY:
            continue
        held_out_loss = _judge(average, drills, to_judge)
        report(f"correction {update}: held-out loss {held_out_loss:.4f}")
        if best.is_final(average, held_out_loss):
            break
    return best.net.export()


def _loss(net: CorrectionNet, batch: Batch) -> Tensor:
    forecast, used, target = batch
    return nn.functional.binary_cross_entropy_with_logits(forecast + net(used), target)


def _judge(net: CorrectionNet, drills: Drills, steps: NDArray[np.intp]) -> float:
    """Mean loss over steps."""
    parts = np.array_split(steps, max(1, len(steps) // BATCH))
    with torch.no_grad():
        losses = [float(_loss(net, drills.batch(part))) for part in parts]
    return float(np.average(losses, weights=[len(part) for part in parts]))
