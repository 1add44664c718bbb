"""Asks predictors which experts later layers will want, and measures what their guesses are worth.

A guess is read when nobody waits, and withdrawn when a later look or the router disproves it, so
that a wrong one holds a demand up by a piece of a read at most. What is named and does not pay is
not read, and measured all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from compute_node.predict.drift import Drift, Way
from compute_node.predict.foresight import Foresight, Settled
from compute_node.predict.predictor import EMBEDDING, NUM_GRADES, Predictor, Seen, graded
from proto.expert import ExpertKey
from proto.stats import counter, gauge

_SMOOTHING = 0.05  # of every running mean: about the last twenty
_PROBE_STEPS = 16  # distances that did not pay are asked about again this often
_FIRST_PRECISION = 0.8  # of the surest grade; others begin lower
_GUESSES, _NOT_RESIDENT = "flashmoe_node_prefetches", "Guesses of experts that were not resident"


class Residency(Protocol):
    """Who knows what need not be guessed."""

    def __contains__(self, key: ExpertKey) -> bool: ...


class Kind(NamedTuple):
    """Guesses that have one precision. has_output: made with what resident experts add."""

    predictor: str
    has_output: bool
    grade: int


@dataclass
class Distance:
    """What guesses at one distance, in layers ahead, have been worth.

    precisions: of what was named, running; by kind
    """

    precisions: dict[Kind, float] = field(default_factory=dict)
    sent: int = counter(_GUESSES, _NOT_RESIDENT, key="prefetches_sent", outcome="sent")
    right: int = counter(_GUESSES, _NOT_RESIDENT, key="prefetches_right", outcome="right")

    @property
    @gauge(
        "flashmoe_node_prefetch_precision",
        "Share of guesses that the router chose",
        key="prefetch_precision",
    )
    def precision(self) -> float:
        """Share of all guesses so far that the router chose."""
        return self.right / self.sent if self.sent else 0.0

    @property
    def best(self) -> float:
        """Precision of the kind that is right most often."""
        return max(self.precisions.values(), default=_FIRST_PRECISION)

    def of(self, kind: Kind) -> float:
        """Precision of a kind."""
        found = self.precisions.get(kind)
        return _FIRST_PRECISION * (1 - kind.grade / NUM_GRADES) if found is None else found

    def settle(self, kind: Kind, was_right: bool) -> None:
        before = self.of(kind)
        self.precisions[kind] = before + _SMOOTHING * (was_right - before)


@dataclass
class LayerNeed:
    """misses: running mean of a step; compute_s: running mean of a step without waiting."""

    misses: float = 1.0
    compute_s: float = 0.0


@dataclass
class Prefetcher:
    """One node's. Pure guesses: what is read, and when, is the store's business.

    layers:    with experts, in the order in which they run
    predictors: name what later layers will want; the first that knows a layer is asked
    truth:     what they foretell, [T, E], of a layer that is reached. Called
               with what its experts get, [T, D]
    resident:  what need not be guessed
    read_s:    seconds that one expert takes from the device, as last measured
    piece_s:   of those, what a demand may wait for behind a wrong guess
    max_guesses: that may be under way at once
    max_depth: layers ahead, at most

    foresight: what is guessed now, by this prefetcher and by others
    num_unguessed: misses that no guess was open about
    """

    layers: tuple[int, ...]
    predictors: Sequence[Predictor]
    truth: Callable[[int, Tensor], Tensor]
    top_k: int
    resident: Residency
    read_s: Callable[[], float]
    piece_s: Callable[[], float]
    max_guesses: int
    max_depth: int
    foresight: Foresight = field(default_factory=Foresight)
    drift: Drift = field(default_factory=Drift)
    distances: list[Distance] = field(default_factory=list)
    num_unguessed: int = counter(
        "flashmoe_node_unguessed_misses",
        "Misses of decode steps that nobody had guessed",
        key="unguessed_misses",
    )
    _named: dict[ExpertKey, set[tuple[int, Kind]]] = field(default_factory=dict)  # distance, kind
    _sent: dict[ExpertKey, tuple[int, str]] = field(default_factory=dict)  # distance, predictor
    _disproved: list[ExpertKey] = field(default_factory=list)  # the store has not heard
    _needs: dict[int, LayerNeed] = field(default_factory=dict)
    _compute_s: float = 0.0  # of all layers' needs
    _misses: float = 0.0  # the same
    _num_steps: int = 0
    _cost_s: float = 1e-4

    def __post_init__(self) -> None:
        self._place = {layer: place for place, layer in enumerate((EMBEDDING, *self.layers), -1)}
        self._needs = {layer: LayerNeed() for layer in self.layers}
        self._misses = sum(need.misses for need in self._needs.values())
        self.distances = [Distance() for _ in range(self.max_depth)]
        for predictor in self.predictors:  # shown before the first guess
            for distance in range(1, self.max_depth + 1):
                self.foresight.worth(predictor.name, distance)

    @property
    @gauge("flashmoe_node_prefetch_depth", "Layers ahead that pay now", key="prefetch_depth")
    def depth(self) -> int:
        """How many layers ahead pays now, by the measured precision, reads and compute."""
        for number in range(self.max_depth):
            if not self._pays(number, self.distances[number].best):
                return number
        return self.max_depth

    def settle(self, layer: int, used: Sequence[ExpertKey], hidden: Tensor) -> Settled:
        """The router of `layer` has spoken: closes the guesses about it. Comes before the cache
        hears of the step. hidden: [T, D], what its experts get
        """
        if self.drift.is_open(layer):
            self.drift.settle(layer, self.truth(layer, hidden))
        misses = [key for key in used if key not in self.resident]
        need = self._needs[layer]
        change = _SMOOTHING * (len(misses) - need.misses)
        need.misses += change
        self._misses += change
        self._measure(layer, used)
        settled = self.foresight.settle(layer, used, misses)
        self._disproved += settled.disproved
        self.num_unguessed += settled.num_unforeseen
        return settled

    def take_disproved(self) -> list[ExpertKey]:
        """Wrong guesses that the store still means to read; the caller withdraws them."""
        disproved, self._disproved = self._disproved, []
        return disproved

    def forget(self, keys: Iterable[ExpertKey]) -> None:
        """Guesses that nobody reads, for lack of room: they count neither as sent nor as foreseen.
        What was named is measured all the same.
        """
        for key in keys:
            number, predictor = self._sent.pop(key)
            self.distances[number].sent -= 1
            self.foresight.forget(key, predictor)

    def computed(self, layer: int, compute_s: float) -> None:
        """What a step of `layer` took without waiting."""
        need = self._needs[layer]
        change_s = _SMOOTHING * (compute_s - need.compute_s)
        need.compute_s += change_s
        self._compute_s += change_s

    def is_worth_asking(self, layer: int) -> bool:
        """Whether guesses about what comes after `layer` may pay."""
        return bool(self._worth_asking(layer))

    def guess(self, seen: Seen) -> list[ExpertKey]:
        """What to read for the layers after it, nearest first. What was guessed about them before
        and is not named now goes to the disproved.
        """
        start_s = time.perf_counter()
        self._num_steps += 1
        found = list[ExpertKey]()
        asked = self._worth_asking(seen.layer)
        if seen.is_early:  # a surer look comes in time for what is further ahead
            asked = [(number, following) for number, following in asked if number == 0]
        if not asked:
            return found
        depth = min(self.depth + (self._num_steps % _PROBE_STEPS == 0), self.max_depth)
        for number, following in asked:
            if number >= depth or len(self.foresight) >= self.max_guesses:
                break
            found += self._look(following, number, seen)
        if found:
            self._cost_s += _SMOOTHING * (time.perf_counter() - start_s - self._cost_s)
        return found

    def _look(self, layer: int, number: int, seen: Seen) -> list[ExpertKey]:
        """Name the experts of one layer. Returns those to read."""
        predictor = next((one for one in self.predictors if one.knows(seen, layer)), None)
        if predictor is None:
            return []
        name, has_output = predictor.name, seen.output is not None
        scores = predictor.scores(seen, layer)
        scores = self.drift.corrected(layer, Way.of(name, seen), scores)
        kinds = {
            key: Kind(name, has_output, grade)
            for grade, expert in graded(scores, self.top_k)
            if (key := ExpertKey(layer, expert)) not in self.resident
        }
        self._retract({key for key in self._sent if key.layer == layer} - kinds.keys())
        fresh = list[ExpertKey]()
        for key, kind in kinds.items():
            self._named.setdefault(key, set()).add((number, kind))
            pays = self._pays(number, self.distances[number].of(kind))
            if pays and self._send(key, number, kind.predictor):
                fresh.append(key)
        return fresh

    def _send(self, key: ExpertKey, number: int, predictor: str) -> bool:
        """Whether the store has to be asked: nobody has, and there is room."""
        if key in self._sent or len(self.foresight) >= self.max_guesses:
            return False
        self._sent[key] = number, predictor
        self.distances[number].sent += 1
        return self.foresight.guessed(key, predictor, number + 1)

    def _retract(self, keys: Iterable[ExpertKey]) -> None:
        for key in keys:
            _, predictor = self._sent.pop(key)
            if self.foresight.retract(key, predictor):
                self._disproved.append(key)

    def _measure(self, layer: int, used: Sequence[ExpertKey]) -> None:
        """What was named of `layer`, sent or not, and whether it was used."""
        for key in [key for key in self._named if key.layer == layer]:
            was_right = key in used
            for number, kind in self._named.pop(key):
                self.distances[number].settle(kind, was_right)
            if key in self._sent:
                number, _ = self._sent.pop(key)
                self.distances[number].right += was_right

    def _lead_s(self, number: int) -> float:
        """Compute that goes on before a guess so far ahead is wanted."""
        return (number + 1) * self._compute_s / len(self._needs)

    def _pays(self, number: int, precision: float) -> bool:
        """A right guess saves what of its read is covered. A wrong one holds a demand up by a
        piece and, as far as the device has more to do than the processor, by its whole read.
        """
        read_s, piece_s = self.read_s(), self.piece_s()
        saved_s = min(read_s, self._lead_s(number))
        lost_s = piece_s + self._excess(read_s) * max(0.0, read_s - piece_s)
        return precision * saved_s > (1 - precision) * lost_s

    def _excess(self, read_s: float) -> float:
        """Of the time that the device reads for a token, what compute cannot cover at best."""
        device_s = self._misses * read_s
        return max(0.0, 1 - self._compute_s / device_s) if device_s else 0.0

    def _worth_asking(self, layer: int) -> list[tuple[int, int]]:
        """What comes so far after `layer` and misses often enough to pay for asking about it."""
        start, read_s = self._place[layer] + 1, self.read_s()
        return [
            (number, following)
            for number, following in enumerate(self.layers[start : start + self.max_depth])
            if self._needs[following].misses * min(read_s, self._lead_s(number)) > self._cost_s
        ]
