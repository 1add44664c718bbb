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

from scheduler.lab.best import Best, move_average
from scheduler.lab.calibration_settings import CalibrationSettings
from scheduler.lab.correction_net import train_correction
from scheduler.lab.forecaster_net import Net, export
from scheduler.lab.lessons import Lessons, Report, Window
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
        random = np.random.default_rng(settings.seed)
        parts = _split(trace, settings.held_out_ratio, random)
        net = _train(lessons, parts, settings, random, report)
        scores = _unused_scores(net, lessons)
        correction = train_correction(scores, trace, parts, settings, report)
    return export(net, correction, lessons, settings, fingerprint)


@contextmanager
def _leaving_a_core() -> Iterator[None]:
    """Threads that wait for one that lost its core cost far more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(
    lessons: Lessons,
    parts: tuple[NDArray[np.intp], NDArray[np.intp]],
    how: CalibrationSettings,
    random: np.random.Generator,
    report: Report,
) -> Net:
    """Until the held-out loss has not improved for a while; returns the best average."""
    torch.manual_seed(how.seed)
    learned, held_out = parts
    net = Net(lessons.trace.shape, len(lessons.names), how)
    average = copy.deepcopy(net).eval()
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=how.learning_rate, weight_decay=how.weight_decay
    )
    best = Best(average, how.patience)
    for update in range(1, how.max_updates + 1):
        _set_learning_rate(optimizer, how, update)
        loss = _loss(net, _draw(lessons, learned, how, random))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        move_average(average, net, update, how.average_updates)
        if update % how.evaluate_every:
            continue
        held_out_loss = _evaluate(average, lessons, held_out)
        report(f"update {update}: held-out loss {held_out_loss:.4f}")
        if best.is_final(average, held_out_loss):
            break
    return best.net


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
) -> Window:
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


def _loss(net: Net, window: Window) -> Tensor:
    """Mean over what is asked: for after the next step, only of what that does not use."""
    logits = net(window.choices, window.features)
    asked = torch.ones_like(logits)
    asked[..., logits.shape[2] // 2 :] = window.unused
    loss = nn.functional.binary_cross_entropy_with_logits(
        logits, window.labels, asked, reduction="sum"
    )
    return loss / asked.sum()


def _evaluate(net: Net, lessons: Lessons, generations: NDArray[np.intp]) -> float:
    """Mean loss over whole generations."""
    offsets, losses, lengths = lessons.trace.seq_offsets, [], []
    with torch.no_grad():
        for one in generations:
            length = int(offsets[one + 1] - offsets[one])
            losses.append(float(_loss(net, lessons.window([int(offsets[one])], length))))
            lengths.append(length)
    return float(np.average(losses, weights=lengths))


def _unused_scores(net: Net, lessons: Lessons) -> NDArray[np.float16]:
    """[T, L, E], after each step: the mean over horizons of P(used after the next step), given that
    the next step does not use it.
    """
    trace = lessons.trace
    scores = np.empty((trace.num_steps, *trace.shape), np.float16)
    with torch.no_grad():
        for start, end in zip(trace.seq_offsets[:-1], trace.seq_offsets[1:], strict=True):
            window = lessons.window([int(start)], int(end - start))
            logits = net(window.choices, window.features)
            means = torch.sigmoid(logits[..., logits.shape[2] // 2 :]).mean(2)
            by_step = means.view(trace.num_layers, -1, trace.num_experts).transpose(0, 1)
            scores[start:end] = by_step.numpy()
    return scores
