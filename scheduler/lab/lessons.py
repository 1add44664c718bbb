"""What a trace teaches a forecaster: the features, choices and labels of every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scheduler.lab.calibration_settings import CalibrationSettings
from scheduler.learn.features import Features, feature_names
from scheduler.learn.followers import Followers
from scheduler.learn.recall import Recall, StepMemory
from scheduler.simulate.trace import AccessTrace

Report = Callable[[str], None]

# Of use to the online learner, but not beside a context: tests/bench/LOG.md.
LEFT_OUT = ("log_gap_mean", "log_gap_std", "age_over_gap", "gate_weight", "log_follows")


@dataclass(frozen=True)
class Window:
    """Steps of B generations, T of each. R is B * T * E.

    choices:  [B, T, L * E]
    features: [L, R, N], scaled
    labels:   [L, R, 2 * H], used within each horizon, and within each after the next step ...
    unused:   [L, R, 1], ... which is asked of what the next step does not use
    """

    choices: Tensor
    features: Tensor
    labels: Tensor
    unused: Tensor


class Lessons:
    """Features, choices and labels of every step of a trace, the features on disk.

    What a step recalls comes from other generations and from its own past, as it will live.
    """

    def __init__(
        self, trace: AccessTrace, settings: CalibrationSettings, scratch: Path, report: Report
    ) -> None:
        self.trace = trace
        self.settings = settings
        every = feature_names(settings.half_lives_tokens)
        self.names = tuple(name for name in every if name not in LEFT_OUT)
        self._columns = [every.index(name) for name in self.names]
        self.used = trace.used()
        self.distance = distances(self.used)
        self.features = self._describe(scratch, report)
        sample = self.features[:: max(1, trace.num_steps // 2000)].astype(np.float32)
        self.mean = sample.mean(axis=(0, 1, 2))
        self.std = np.maximum(sample.std(axis=(0, 1, 2)), 1e-3)

    def window(self, starts: list[int], num_steps: int) -> Window:
        """`num_steps` steps from each of these."""
        spans = [slice(start, start + num_steps) for start in starts]
        used = np.stack([self.used[span] for span in spans])
        rows = _by_layer(np.stack([self.features[span] for span in spans]))
        away = _by_layer(np.stack([self.distance[span] for span in spans])[..., None])
        horizons = np.array(self.settings.horizons_steps)
        labels = np.concatenate([away <= horizons, away <= 1 + horizons], axis=2)
        return Window(
            torch.from_numpy(used.reshape(*used.shape[:2], -1).astype(np.float32)),
            torch.from_numpy((rows.astype(np.float32) - self.mean) / self.std),
            torch.from_numpy(labels.astype(np.float32)),
            torch.from_numpy((away > 1).astype(np.float32)),
        )

    def _describe(self, scratch: Path, report: Report) -> NDArray[np.float16]:
        """[T, L, E, N] float16, mapped from disk."""
        trace = self.trace
        shape = (trace.num_steps, *trace.shape, len(self.names))
        rows = np.memmap(scratch / "features", np.float16, "w+", shape=shape)
        features, recall = self._new_features()
        begins, ends = (
            np.repeat(edge, np.diff(trace.seq_offsets))
            for edge in (trace.seq_offsets[:-1], trace.seq_offsets[1:])
        )
        for step, event in enumerate(trace.events()):
            if step == begins[step]:
                recall.begin(slice(step, int(ends[step])))
            features.update(event)
            rows[step] = features.table()[self._columns].transpose(1, 2, 0)
            if step % 5000 == 0:
                report(f"described {step} of {trace.num_steps} steps")
        return rows

    def _new_features(self) -> tuple[Features, _OtherGenerations]:
        shape = self.trace.shape
        everything = StepMemory(shape, self.trace.num_steps)
        for chosen in self.trace.topk_ids:
            everything.append(chosen.astype(np.intp))
        recall = _OtherGenerations(shape, everything)
        half_lives = self.settings.half_lives_tokens
        return Features(shape, half_lives, Followers(*shape), recall), recall


class _OtherGenerations(Recall):
    """Recalls other generations of a trace, and of the current one what has passed."""

    def __init__(self, shape: tuple[int, int], everything: StepMemory) -> None:
        super().__init__(shape, everything)
        self._everything = everything

    def begin(self, generation: slice) -> None:
        """A generation that takes these places of the trace."""
        self._everything.hidden = generation
        own = StepMemory(self._shape, generation.stop - generation.start)
        self._memories = (self._everything, own)


def _by_layer(rows: NDArray[Any]) -> NDArray[Any]:
    """[B, T, L, E, N] as [L, B * T * E, N]."""
    return rows.transpose(2, 0, 1, 3, 4).reshape(rows.shape[2], -1, rows.shape[4])


def distances(used: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """[T, L, E], steps until the next use after each step, 255 for later or never."""
    distance = np.full(used.shape, 255, np.uint8)
    ahead = np.full(used.shape[1:], 255, np.uint8)
    for step in range(len(used) - 1, -1, -1):
        distance[step] = ahead
        ahead = np.where(used[step], 1, np.minimum(ahead, 254) + 1).astype(np.uint8)
    return distance
