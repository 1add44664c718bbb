"""Trains a forecaster on an access trace, offline; the only file of the scheduler with torch.

A gated recurrent unit over the experts of all layers gives every expert a context; a small head a
layer joins it with the expert's own features (recency, frequencies, what came after steps alike).
Whole generations are held out to stop by; the weights kept are a moving average.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scheduler.learn.features import Features, feature_names
from scheduler.learn.followers import Followers
from scheduler.learn.forecaster import Forecaster, ForecasterSpec
from scheduler.learn.recall import Recall, StepMemory, step_bytes
from scheduler.simulate.trace import AccessTrace, TraceInvalid

Report = Callable[[str], None]

MIN_GENERATIONS = 4
MAX_REMEMBERED_BYTES = 32 << 20  # in the scheduler; 80,000 steps of 24 x 32, 13,000 of 48 x 128
# Of use to the online learner, but not beside a context: tests/bench/LOG.md.
LEFT_OUT = ("log_gap_mean", "log_gap_std", "age_over_gap", "gate_weight", "log_follows")


@dataclass(frozen=True)
class CalibrationSettings:
    """How a forecaster is trained.

    lag_steps:         1: its answers will be used one step late, as live
    max_updates:       of the weights, each on `batch` windows of `window_steps`
    patience:          evaluations without a better held-out loss before it stops
    held_out_ratio:    of the generations, to stop by
    average_updates:   about this many last updates make up the weights kept
    """

    lag_steps: int = 0
    horizons_steps: tuple[int, ...] = (2, 8, 24)
    half_lives_tokens: tuple[float, ...] = (2.0, 8.0, 16.0, 64.0)
    width: int = 256
    hidden: int = 12
    dropout: float = 0.2
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.02
    batch: int = 8
    window_steps: int = 96
    max_updates: int = 1200
    evaluate_every: int = 100
    patience: int = 4
    held_out_ratio: float = 0.08
    average_updates: int = 200
    seed: int = 0


def calibrate(
    trace: AccessTrace,
    settings: CalibrationSettings,
    report: Report = lambda line: None,
    fingerprint: str = "",
) -> Forecaster:
    """A forecaster for streams like this trace.

    Raises TraceInvalid when the trace has too few generations to hold some out.
    """
    if trace.num_generations < MIN_GENERATIONS:
        raise TraceInvalid(
            f"{trace.name} has {trace.num_generations} generations, calibration needs at least "
            f"{MIN_GENERATIONS}: record more prompts"
        )
    with tempfile.TemporaryDirectory(prefix="flashmoe-calibrate-") as scratch, _leaving_a_core():
        lessons = Lessons(trace, settings, Path(scratch), report)
        net = _train(lessons, settings, report)
    return export(net, lessons, settings, fingerprint)


@contextmanager
def _leaving_a_core() -> Iterator[None]:
    """Threads that wait for one that lost its core cost far more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        self.distance = _distances(self.used, settings.lag_steps)
        self.features = self._describe(scratch, report)
        sample = self.features[:: max(1, trace.num_steps // 2000)].astype(np.float32)
        self.mean = sample.mean(axis=(0, 1, 2))
        self.std = np.maximum(sample.std(axis=(0, 1, 2)), 1e-3)

    def window(self, starts: list[int], num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Choices [B, T, L * E], scaled features [L, B * T * E, N], labels [L, B * T * E, H]."""
        spans = [slice(start, start + num_steps) for start in starts]
        used = np.stack([self.used[span] for span in spans])
        rows = _by_layer(np.stack([self.features[span] for span in spans]))
        away = _by_layer(np.stack([self.distance[span] for span in spans])[..., None])
        labels = away <= np.array(self.settings.horizons_steps)
        return (
            torch.from_numpy(used.reshape(*used.shape[:2], -1).astype(np.float32)),
            torch.from_numpy((rows.astype(np.float32) - self.mean) / self.std),
            torch.from_numpy(labels.astype(np.float32)),
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


class Net(nn.Module):
    """The forecaster as torch trains it; `scheduler.learn.forecaster` runs the same in numpy."""

    def __init__(self, shape: tuple[int, int], num_features: int, how: CalibrationSettings) -> None:
        super().__init__()
        layers, experts = shape
        self.shape = (layers, experts, len(how.horizons_steps))
        num_horizons = len(how.horizons_steps)
        self.embed = nn.Linear(layers * experts, how.width)
        self.gru = nn.GRU(how.width, how.width, batch_first=True)
        self.context = nn.Linear(how.width, layers * experts * num_horizons)
        nn.init.zeros_(self.context.weight)
        nn.init.zeros_(self.context.bias)
        self.linear = nn.Parameter(torch.zeros(layers, num_features, num_horizons))
        joined = num_features + num_horizons
        self.head_input = nn.Parameter(torch.randn(layers, joined, how.hidden) / joined**0.5)
        self.head_bias = nn.Parameter(torch.zeros(layers, 1, how.hidden))
        self.head_output = nn.Parameter(torch.zeros(layers, how.hidden, num_horizons))
        self.dropout = nn.Dropout(how.dropout)

    def forward(self, used: Tensor, features: Tensor) -> Tensor:
        """Logits [L, B * T * E, H] from choices [B, T, L * E], features [L, B * T * E, N]."""
        layers, experts, num_horizons = self.shape
        state, _ = self.gru(torch.relu(self.embed(self.dropout(used))))
        context = self.context(self.dropout(state)).view(-1, layers, experts, num_horizons)
        context = context.transpose(0, 1).reshape(layers, -1, num_horizons)
        logits = torch.baddbmm(context, features, self.linear)
        of_features, of_logits = torch.split(
            self.head_input, [features.shape[2], num_horizons], dim=1
        )
        hidden = torch.baddbmm(self.head_bias, features, of_features)
        hidden = torch.relu(torch.baddbmm(hidden, logits, of_logits))
        return torch.baddbmm(logits, hidden, self.head_output)


def _by_layer(rows: NDArray[Any]) -> NDArray[Any]:
    """[B, T, L, E, N] as [L, B * T * E, N]."""
    return rows.transpose(2, 0, 1, 3, 4).reshape(rows.shape[2], -1, rows.shape[4])


def _train(lessons: Lessons, how: CalibrationSettings, report: Report) -> Net:
    """Until the held-out loss has not improved for a while; returns the best average."""
    torch.manual_seed(how.seed)
    random = np.random.default_rng(how.seed)
    learned, held_out = _split(lessons.trace, how.held_out_ratio, random)
    net = Net(lessons.trace.shape, len(lessons.names), how)
    average = copy.deepcopy(net).eval()
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=how.learning_rate, weight_decay=how.weight_decay
    )
    best, best_loss, since_best = copy.deepcopy(average), float("inf"), 0
    for update in range(1, how.max_updates + 1):
        _set_learning_rate(optimizer, how, update)
        loss = _loss(net, *_draw(lessons, learned, how, random))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        _move_average(average, net, update, how.average_updates)
        if update % how.evaluate_every:
            continue
        held_out_loss = _evaluate(average, lessons, held_out)
        report(f"update {update}: held-out loss {held_out_loss:.4f}")
        since_best += 1
        if held_out_loss < best_loss:
            best, best_loss, since_best = copy.deepcopy(average), held_out_loss, 0
        if since_best >= how.patience:
            break
    return best


def _split(
    trace: AccessTrace, ratio: float, random: np.random.Generator
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Generations to learn from and to hold out, one at least."""
    shuffled = random.permutation(trace.num_generations)
    num_held_out = max(1, round(ratio * trace.num_generations))
    return np.sort(shuffled[num_held_out:]), np.sort(shuffled[:num_held_out])


def _set_learning_rate(
    optimizer: torch.optim.Optimizer, how: CalibrationSettings, update: int
) -> None:
    """Warmed up over 50 updates, then falling in a line to a tenth."""
    rate = how.learning_rate * min(1.0, update / 50) * (1 - 0.9 * update / how.max_updates)
    for group in optimizer.param_groups:
        group["lr"] = rate


def _draw(
    lessons: Lessons,
    generations: NDArray[np.intp],
    how: CalibrationSettings,
    random: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Windows from generations drawn at random, all as long as the shortest allows."""
    offsets = lessons.trace.seq_offsets
    drawn = random.choice(generations, how.batch)
    lengths = offsets[drawn + 1] - offsets[drawn]
    num_steps = min(how.window_steps, int(lengths.min()))
    starts = [
        int(offsets[one] + random.integers(0, length - num_steps + 1))
        for one, length in zip(drawn, lengths, strict=True)
    ]
    return lessons.window(starts, num_steps)


def _loss(net: Net, used: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(net(used, features), labels)


def _evaluate(net: Net, lessons: Lessons, generations: NDArray[np.intp]) -> float:
    """Mean loss over whole generations."""
    offsets, losses, lengths = lessons.trace.seq_offsets, [], []
    with torch.no_grad():
        for one in generations:
            length = int(offsets[one + 1] - offsets[one])
            losses.append(float(_loss(net, *lessons.window([int(offsets[one])], length))))
            lengths.append(length)
    return float(np.average(losses, weights=lengths))


def _move_average(average: Net, net: Net, update: int, average_updates: int) -> None:
    share = max(1 / average_updates, 1 / (1 + update / 10))
    with torch.no_grad():
        for kept, new in zip(average.parameters(), net.parameters(), strict=True):
            kept.lerp_(new, min(1.0, share))


def _distances(used: NDArray[np.bool_], lag_steps: int) -> NDArray[np.uint8]:
    """[T, L, E], steps until the next use after each step and its lag, 255 for later or never."""
    distance = np.full(used.shape, 255, np.uint8)
    ahead = np.full(used.shape[1:], 255, np.uint8)
    for step in range(len(used) - 1, -1, -1):
        distance[step] = ahead
        ahead = np.where(used[step], 1, np.minimum(ahead, 254) + 1).astype(np.uint8)
    if lag_steps:
        distance[:-lag_steps] = distance[lag_steps:]
    return distance


def export(net: Net, lessons: Lessons, how: CalibrationSettings, fingerprint: str) -> Forecaster:
    """Weights for unscaled features, in the layout that numpy multiplies with."""
    trace = lessons.trace
    spec = ForecasterSpec(
        fingerprint=fingerprint,
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        horizons_steps=how.horizons_steps,
        half_lives_tokens=how.half_lives_tokens,
        feature_names=lessons.names,
        lag_steps=how.lag_steps,
        width=how.width,
        hidden=how.hidden,
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
