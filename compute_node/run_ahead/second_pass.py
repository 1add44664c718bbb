"""A second forward of a decode step, in a greenlet: it computes on where the true one waits, with
resident experts only, and goes on with the tokens that will likely be drawn.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from compute_node.cache.asked import never
from compute_node.kernels.expert_kernels import ExpertKernels
from compute_node.kernels.torch_experts import Tensors
from compute_node.moe.route import Route
from compute_node.moe.step import Batch, Part, Phase, Step
from compute_node.run_ahead.fork import Fork
from compute_node.run_ahead.layers import DecoderLayers

Draw = Callable[[Tensor], int]
ModelForward = Callable[[Tensor, Any], Any]


class Guide(Protocol):
    """What a second pass serves."""

    def is_due(self) -> bool:
        """Whether the true pass has something better to do than to wait."""
        ...

    def foresee(self, num_tokens: int, layer: int, experts: Sequence[int]) -> bool:
        """A layer's router chose these, the heaviest first. Returns whether that is as far ahead as
        it pays.

        num_tokens: after the one that the second pass began with
        """
        ...

    def usable(self, layer: int, experts: Sequence[int]) -> Mapping[int, Tensors]:
        """Some of these that are resident."""
        ...


@dataclass(frozen=True)
class Start:
    """Where a second pass begins.

    token:   its id, [1, 1]
    stalled: the layer whose experts the true pass awaits
    so_far:  [1, D], an estimate of that layer's output
    draw:    the next token from logits [1, V]; None: it ends with this token
    """

    token: Tensor
    stalled: int
    so_far: Tensor
    draw: Draw | None


class SecondPass:
    """One thread. Its output is only a guess, and thrown away.

    drawn:     tokens that it went on with
    is_over:   it reached its end, or failed
    failure:   what it ended by
    """

    def __init__(
        self, forward: ModelForward, layers: DecoderLayers, fork: Fork, start: Start, guide: Guide
    ) -> None:
        self._forward, self._layers, self._fork = forward, layers, fork
        self._start, self._guide = start, guide
        self.stalled = start.stalled
        self.drawn: list[int] = []
        self.failure: Exception | None = None
        context = contextvars.copy_context()
        self._greenlet = greenlet(lambda: context.run(self._compute))
        self._true = getcurrent()

    @property
    def is_over(self) -> bool:
        return self._greenlet.dead

    def resume(self) -> None:
        """Compute on until the guide wants the thread back. Raises nothing that it raises."""
        with self._running():
            self._greenlet.switch()

    def drop(self) -> None:
        """It is not resumed any more: what it holds is free."""
        if self._greenlet and not self._greenlet.dead:
            with self._running():
                self._greenlet.throw()

    @contextmanager
    def _running(self) -> Iterator[None]:
        """torch's modes and number of threads are this thread's: they are left as they were. One
        core is left to the store, which the true pass waits for.
        """
        threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
        self._true = self._greenlet.parent = getcurrent()
        self._layers.second = self
        torch.set_num_threads(max(1, threads - 1))
        try:
            with torch.inference_mode():
                yield
        finally:
            self._layers.second = None
            torch.set_num_threads(threads)
            torch.set_grad_enabled(grad)

    def _compute(self) -> None:
        part = Part("run-ahead", Phase.DECODE, 1, 1)
        try:
            with Step(Batch(part), never, emulation=self).running():
                self._passes()
        except Exception as error:  # noqa: BLE001  looked at after each resume
            self.failure = error

    def _passes(self) -> None:
        output = self._forward(self._start.token, self._fork.state)
        while self._start.draw is not None:
            self._fork.skip(self.stalled)
            self.stalled = -1
            self.drawn.append(self._start.draw(output.logits[:, -1, :]))
            output = self._forward(torch.tensor([self.drawn[-1:]]), self._fork.state)

    def enter(self, number: int) -> None:
        self._fork.enter(number)

    def leave(self, number: int) -> None:
        self._fork.leave(number)

    def skip(self, number: int) -> None:
        self._fork.skip(number)

    def pause_if_due(self) -> None:
        while self._guide.is_due():
            self._pause()

    def _pause(self) -> None:
        self._true.switch()

    def experts(
        self, layer: int, kernels: ExpertKernels, num_experts: int, hidden: Tensor, route: Route
    ) -> Tensor:
        """An estimate of the layer's output from the heaviest experts that are resident, whose
        weights stand for those of all. hidden: [1, D]
        """
        if layer <= self.stalled:
            return self._start.so_far.view_as(hidden).to(hidden.dtype)
        chosen = zip(route.ids[0].tolist(), route.weights[0].tolist(), strict=True)
        gates = {expert: gate for expert, gate in chosen if expert < num_experts}
        order = sorted(gates, key=gates.__getitem__, reverse=True)
        self.pause_if_due()
        while self._guide.foresee(len(self.drawn), layer, order):
            self._pause()
        return self._output(kernels, hidden, gates, self._guide.usable(layer, order))

    def _output(
        self,
        kernels: ExpertKernels,
        hidden: Tensor,
        gates: Mapping[int, float],
        usable: Mapping[int, Tensors],
    ) -> Tensor:
        used = sum(gates[expert] for expert in usable)
        share = sum(gates.values()) / used if used else 0.0
        total = torch.zeros_like(hidden)
        for expert, tensors in usable.items():
            total += kernels.one_token([tensors], hidden, [gates[expert] * share])
            self.pause_if_due()
        return total
