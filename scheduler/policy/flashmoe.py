"""The policy of FlashMoE (arXiv 2601.17063): a small net a layer imitates Belady's optimum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from proto.access import DecodeAccess
from scheduler.policy.lru import Lru
from scheduler.simulate.ranking import Ranks, chosen
from scheduler.simulate.trace import AccessTrace

Array = NDArray[np.float32]

FIRST_LESSON_STEPS = 256


@dataclass(frozen=True)
class Net:
    """2E -> 64 -> 64 -> E with SiLU between, for each layer. [L, in, out] and [L, 1, out] each."""

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]

    def scores(self, features: Array) -> Array:
        """[L, 2E] -> [L, E], how far away the next use is: 0 at the next step, 1 at the horizon."""
        x = features[:, None, :]
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = x @ weight + bias
            x = x / (1 + np.exp(-x))
        scores: Array = (x @ self.weights[-1] + self.biases[-1])[:, 0]
        return scores


class Usage:
    """What a net sees: 1 / recency, and frequency over that of the layer's most frequent expert.

    Frequency is of the current generation, as in the paper, which runs one prompt at a time.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self._recency = Lru(shape)
        self._frequency = np.zeros(shape, np.float32)
        self._used = np.zeros(shape, np.bool_)

    def observe(self, event: DecodeAccess) -> None:
        if event.step == 0:
            self._frequency[:] = 0
        at = chosen(event)
        self._recency.observe(event)
        self._frequency[at] += 1
        self._used[at] = True

    def recency(self) -> Ranks:
        """[L, E], higher for what was used later."""
        return self._recency.ranks()

    def features(self) -> Array:
        """[L, 2E]"""
        recency = self._used / (1 - self._recency.ranks())
        most = np.maximum(1, self._frequency.max(axis=1, keepdims=True))
        frequency = self._frequency / most
        return np.concatenate([recency, frequency], axis=1, dtype=np.float32)


class FlashMoe:
    """Evicts what its net says is used again last.

    net: trained before. None: it evicts by recency until `learn` has trained one on its own past,
    after 256 steps, 512, 1024, and so on.
    """

    def __init__(
        self, shape: tuple[int, int], net: Net | None, learn: Callable[[AccessTrace], Net]
    ) -> None:
        self._usage = Usage(shape)
        self._net = net
        self._learn = learn
        self._past = None if net else _Past(shape[1])

    def observe(self, event: DecodeAccess) -> None:
        self._usage.observe(event)
        if self._past is not None:
            self._past.append(event)
            if self._past.is_lesson_due:
                self._net = self._learn(self._past.trace())

    def ranks(self) -> Ranks:
        if self._net is None:
            return self._usage.recency()
        return -self._net.scores(self._usage.features()).astype(np.float64)


class _Past:
    """The events so far, to learn from."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._events: list[DecodeAccess] = []

    @property
    def is_lesson_due(self) -> bool:
        num_lessons, rest = divmod(len(self._events), FIRST_LESSON_STEPS)
        return not rest and num_lessons.bit_count() == 1

    def append(self, event: DecodeAccess) -> None:
        self._events.append(event)

    def trace(self) -> AccessTrace:
        starts = [at for at, event in enumerate(self._events) if event.step == 0]
        return AccessTrace(
            name="the past",
            topk_ids=np.stack([event.topk_ids for event in self._events]),
            seq_offsets=np.array([*starts, len(self._events)], np.int64),
            num_experts=self._num_experts,
            topk_weights=np.stack([event.topk_weights for event in self._events]),
        )
