"""Trains the nets of the `flashmoe` policy offline: supervised by Belady's next-use distance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from scheduler.policy.flashmoe import Net, Usage
from scheduler.simulate.trace import AccessTrace

WIDTH = 64
HORIZON_SHARE = 0.75  # of the experts of a layer, in steps
LEARNING_RATE = 2e-3
BATCH_STEPS = 256
MAX_EPOCHS = 40
PATIENCE_EPOCHS = 4
HELD_OUT_SHARE = 0.1
MIN_GENERATIONS = 10  # fewer: the last steps are held out, not whole generations
MAX_EXAMPLE_BYTES = 512 << 20

Steps = NDArray[np.intp]


def imitate_belady(trace: AccessTrace, seed: int = 0) -> Net:
    """The net of the epoch that did best on generations it was not trained on."""
    examples = _examples(trace)
    is_held_out = _held_out(trace, np.random.default_rng(seed))[examples.steps]
    with _one_thread():
        return _Training(trace.shape, seed).run(
            examples,
            torch.from_numpy(np.flatnonzero(~is_held_out)),
            torch.from_numpy(np.flatnonzero(is_held_out)),
        )


@dataclass(frozen=True)
class _Examples:
    """N steps of a trace, evenly spaced.

    steps:     [N]
    inputs:    [N, L, 2E] float16
    distances: [N, L, E] float16, to the next use: 0 at the next step, 1 at the horizon or later
    """

    steps: Steps
    inputs: Tensor
    distances: Tensor

    def batch(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Layers first, for torch.bmm."""
        inputs, distances = self.inputs[at], self.distances[at]
        return inputs.float().transpose(0, 1), distances.float().transpose(0, 1)


def _examples(trace: AccessTrace) -> _Examples:
    num_layers, num_experts = trace.shape
    bytes_per_step = 2 * 3 * num_layers * num_experts
    stride = -(-trace.num_steps * bytes_per_step // MAX_EXAMPLE_BYTES)
    steps = np.arange(0, trace.num_steps, stride)
    return _Examples(
        steps,
        torch.from_numpy(_inputs(trace, steps)),
        torch.from_numpy(_distances(trace, steps)),
    )


def _inputs(trace: AccessTrace, steps: Steps) -> NDArray[np.float16]:
    num_layers, num_experts = trace.shape
    inputs = np.empty((len(steps), num_layers, 2 * num_experts), np.float16)
    usage, stride = Usage(trace.shape), int(steps[1] - steps[0]) if len(steps) > 1 else 1
    for step, event in enumerate(trace.events()):
        usage.observe(event)
        if step % stride == 0:
            inputs[step // stride] = usage.features()
    return inputs


def _distances(trace: AccessTrace, steps: Steps) -> NDArray[np.float16]:
    horizon = max(2, int(HORIZON_SHARE * trace.num_experts))
    distances = np.empty((len(steps), *trace.shape), np.float16)
    next_use = np.full(trace.shape, np.inf, np.float32)
    rows = np.arange(trace.num_layers)[:, None]
    at = len(steps) - 1
    for step in range(trace.num_steps - 1, -1, -1):
        if at >= 0 and step == steps[at]:
            distances[at] = (np.minimum(next_use - step, horizon) - 1) / (horizon - 1)
            at -= 1
        next_use[rows, trace.topk_ids[step].astype(np.intp)] = step
    return distances


def _held_out(trace: AccessTrace, random: np.random.Generator) -> NDArray[np.bool_]:
    """[T], which steps are not to be trained on: a tenth, by whole generations when there are
    enough.
    """
    held_out = np.zeros(trace.num_steps, np.bool_)
    wanted = HELD_OUT_SHARE * trace.num_steps
    if trace.num_generations < MIN_GENERATIONS:
        held_out[-max(1, int(wanted)) :] = True
        return held_out
    spans = list(pairwise(trace.seq_offsets))
    for generation in random.permutation(trace.num_generations):
        if held_out.sum() >= wanted:
            break
        held_out[slice(*spans[generation])] = True
    return held_out


class _Training:
    """One net a layer, all at once."""

    def __init__(self, shape: tuple[int, int], seed: int) -> None:
        num_layers, num_experts = shape
        self._random = torch.Generator().manual_seed(seed)
        widths = (2 * num_experts, WIDTH, WIDTH, num_experts)
        self._weights = [
            self._uniform(num_layers, inputs, outputs) for inputs, outputs in pairwise(widths)
        ]
        self._biases = [
            torch.zeros(num_layers, 1, outputs, requires_grad=True) for outputs in widths[1:]
        ]
        self._optimizer = torch.optim.AdamW([*self._weights, *self._biases], lr=LEARNING_RATE)

    def run(self, examples: _Examples, training: Tensor, held_out: Tensor) -> Net:
        """training, held_out: which examples."""
        best, best_loss, waited = self._net(), self._loss(examples, held_out), 0
        for _ in range(MAX_EPOCHS):
            self._epoch(examples, training)
            loss = self._loss(examples, held_out)
            waited = 0 if loss < best_loss else waited + 1
            if not waited:
                best, best_loss = self._net(), loss
            elif waited == PATIENCE_EPOCHS:
                break
        return best

    def _epoch(self, examples: _Examples, training: Tensor) -> None:
        shuffled = training[torch.randperm(len(training), generator=self._random)]
        for at in torch.split(shuffled, BATCH_STEPS):
            inputs, distances = examples.batch(at)
            self._optimizer.zero_grad()
            functional.mse_loss(self._forward(inputs), distances).backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()

    @torch.no_grad()
    def _loss(self, examples: _Examples, held_out: Tensor) -> float:
        total = 0.0
        for at in torch.split(held_out, BATCH_STEPS):
            inputs, distances = examples.batch(at)
            total += len(at) * float(functional.mse_loss(self._forward(inputs), distances))
        return total / len(held_out)

    def _forward(self, inputs: Tensor) -> Tensor:
        """[L, B, 2E] -> [L, B, E]"""
        x = inputs
        for weight, bias in zip(self._weights[:-1], self._biases[:-1], strict=True):
            x = functional.silu(torch.baddbmm(bias, x, weight))
        distances: Tensor = torch.baddbmm(self._biases[-1], x, self._weights[-1])
        return distances

    def _uniform(self, *shape: int) -> Tensor:
        """As torch.nn.Linear begins: bounded by 1 / sqrt(inputs)."""
        bound = shape[-2] ** -0.5
        drawn = torch.rand(shape, generator=self._random)
        weight: Tensor = ((2 * drawn - 1) * bound).requires_grad_()
        return weight

    def _net(self) -> Net:
        return Net(
            tuple(weight.detach().numpy().copy() for weight in self._weights),
            tuple(bias.detach().numpy().copy() for bias in self._biases),
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
