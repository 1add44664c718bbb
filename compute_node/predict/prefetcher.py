"""Asks a predictor which experts later layers will want, and counts what its guesses are worth.

A guess is read when nobody waits, and withdrawn when the router disproves it, so that a wrong one
holds a demand up by a piece of a read at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from compute_node.predict.foresight import Foresight, Settled
from compute_node.predict.predictor import Predictor, Seen
from proto.expert import ExpertKey
from proto.stats import counter, gauge

_SMOOTHING = 0.05  # of every running mean: about the last twenty
_PROBE_STEPS = 16  # ranks and distances that did not pay are tried again this often
_FIRST_PRECISION = 0.8
_GUESSES, _NOT_RESIDENT = "flashmoe_node_prefetches", "Guesses of experts that were not resident"


class Residency(Protocol):
    """Who knows what need not be guessed."""

    def __contains__(self, key: ExpertKey) -> bool: ...


@dataclass
class Distance:
    """What guesses at one distance, in layers ahead, have been worth.

    precisions: by the rank that the asked router gave them, running
    """

    precisions: list[float]
    sent: int = counter(_GUESSES, _NOT_RESIDENT, key="prefetches_sent", outcome="sent")
    right: int = counter(_GUESSES, _NOT_RESIDENT, key="prefetches_right", outcome="right")

    @classmethod
    def fresh(cls, top_k: int) -> Distance:
        """With a start that lets every rank try."""
        return cls([_FIRST_PRECISION] * top_k)

    @property
    @gauge(
        "flashmoe_node_prefetch_precision",
        "Share of guesses that the router chose",
        key="prefetch_precision",
    )
    def precision(self) -> float:
        """Share of all guesses so far that the router chose."""
        return self.right / self.sent if self.sent else 0.0

    def settle(self, rank: int, was_right: bool) -> None:
        self.right += was_right
        self.precisions[rank] += _SMOOTHING * (was_right - self.precisions[rank])


@dataclass
class LayerNeed:
    """misses: running mean of a step; compute_s: running mean of a step without waiting."""

    misses: float = 1.0
    compute_s: float = 0.0


@dataclass
class Prefetcher:
    """One node's. Pure guesses: what is read, and when, is the store's business.

    layers:    with experts, in the order in which they run
    predictor: names what later layers will want
    resident:  what need not be guessed
    read_s:    seconds that one expert takes from the device, as last measured
    piece_s:   of those, what a demand may wait for behind a wrong guess
    max_guesses: that may be under way at once
    max_depth: layers ahead, at most

    foresight: what is guessed now, by this prefetcher and by others
    num_unguessed: misses that no guess was open about
    """

    layers: tuple[int, ...]
    predictor: Predictor
    top_k: int
    resident: Residency
    read_s: Callable[[], float]
    piece_s: Callable[[], float]
    max_guesses: int
    max_depth: int
    foresight: Foresight = field(default_factory=Foresight)
    distances: list[Distance] = field(default_factory=list)
    num_unguessed: int = counter(
        "flashmoe_node_unguessed_misses",
        "Misses of decode steps that nobody had guessed",
        key="unguessed_misses",
    )
    _open: dict[ExpertKey, tuple[int, int]] = field(default_factory=dict)  # distance, rank
    _disproved: list[ExpertKey] = field(default_factory=list)  # the store has not heard
    _needs: dict[int, LayerNeed] = field(default_factory=dict)
    _compute_s: float = 0.0  # of all layers' needs
    _num_steps: int = 0
    _cost_s: float = 1e-4

    def __post_init__(self) -> None:
        self._place = {layer: place for place, layer in enumerate(self.layers)}
        self._needs = {layer: LayerNeed() for layer in self.layers}
        self.distances = [Distance.fresh(self.top_k) for _ in range(self.max_depth)]

    @property
    @gauge("flashmoe_node_prefetch_depth", "Layers ahead that pay now", key="prefetch_depth")
    def depth(self) -> int:
        """How many layers ahead pays now, by the measured precision, reads and compute."""
        for number in range(self.max_depth):
            if not any(self._pays(number, rank) for rank in range(self.top_k)):
                return number
        return self.max_depth

    def settle(self, layer: int, used: Sequence[ExpertKey]) -> Settled:
        """The router of `layer` has spoken: closes the guesses about it. Comes before the cache
        hears of the step.
        """
        misses = [key for key in used if key not in self.resident]
        need = self._needs[layer]
        need.misses += _SMOOTHING * (len(misses) - need.misses)
        for key in [key for key in self._open if key.layer == layer]:
            number, rank = self._open.pop(key)
            self.distances[number].settle(rank, key in used)
        settled = self.foresight.settle(layer, used, misses)
        self._disproved += settled.disproved
        self.num_unguessed += settled.num_unforeseen
        return settled

    def take_disproved(self) -> list[ExpertKey]:
        """Wrong guesses that the store still means to read; the caller withdraws them."""
        disproved, self._disproved = self._disproved, []
        return disproved

    def computed(self, layer: int, compute_s: float) -> None:
        """What a step of `layer` took without waiting."""
        need = self._needs[layer]
        change_s = _SMOOTHING * (compute_s - need.compute_s)
        need.compute_s += change_s
        self._compute_s += change_s

    def guess(self, seen: Seen) -> list[ExpertKey]:
        """What to read for the layers after it, nearest first."""
        start_s = time.perf_counter()
        self._num_steps += 1
        found = list[ExpertKey]()
        asked = self._worth_asking(seen.layer)
        if not asked:
            return found
        is_probe = self._num_steps % _PROBE_STEPS == 0
        depth = min(self.depth + is_probe, self.max_depth)
        for number, following in asked:
            if number >= depth or len(self.foresight) >= self.max_guesses:
                break
            found += self._guesses(following, number, seen, is_probe)
        if found:
            self._cost_s += _SMOOTHING * (time.perf_counter() - start_s - self._cost_s)
        return found

    def _guesses(self, layer: int, number: int, seen: Seen, is_probe: bool) -> list[ExpertKey]:
        fresh = list[ExpertKey]()
        for rank, expert in self.predictor.predict(seen, layer, self.top_k):
            key = ExpertKey(layer, expert)
            if len(self.foresight) >= self.max_guesses:
                break
            if key in self.resident or key in self._open:
                continue
            if is_probe or self._pays(number, rank):
                self._open[key] = number, rank
                self.distances[number].sent += 1
                if self.foresight.guessed(key, self.predictor.name, number + 1):
                    fresh.append(key)
        return fresh

    def _lead_s(self, number: int) -> float:
        """Compute that goes on before a guess so far ahead is wanted."""
        return (number + 1) * self._compute_s / len(self._needs)

    def _pays(self, number: int, rank: int) -> bool:
        """A right guess saves what of its read is covered; a wrong one holds a demand up."""
        precision = self.distances[number].precisions[rank]
        saved_s = min(self.read_s(), self._lead_s(number))
        return precision * saved_s > (1 - precision) * self.piece_s()

    def _worth_asking(self, layer: int) -> list[tuple[int, int]]:
        """What comes so far after `layer` and misses often enough to pay for asking its router."""
        start, read_s = self._place[layer] + 1, self.read_s()
        return [
            (number, following)
            for number, following in enumerate(self.layers[start : start + self.max_depth])
            if self.predictor.knows(following)
            and self._needs[following].misses * min(read_s, self._lead_s(number)) > self._cost_s
        ]
