"""Trains a forecaster on an access trace, offline.

A gated recurrent unit over the experts of all layers gives every expert a context; a small head a
layer joins it with the expert's own features (recency, frequencies, what came after steps alike).
Whole generations are held out to stop by; the weights kept are a moving average.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scheduler.lab.calibration_settings import CalibrationSettings
from scheduler.lab.forecaster_net import Net, export
from scheduler.lab.lessons import Lessons, Report
from scheduler.learn.forecaster import Forecaster
from scheduler.simulate.trace import AccessTrace, TraceInvalid

MIN_GENERATIONS = 4


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
