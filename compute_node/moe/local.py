"""Experts computed in this process, on weights borrowed from the store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from compute_node.cache.asked import Meanwhile, sleep
from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.waits import Waits
from compute_node.moe.looks import Looks
from compute_node.moe.portions import portions
from compute_node.moe.route import Route
from compute_node.moe.step import Step
from compute_node.moe.sums import Sum, add_wave
from compute_node.predict.foresight import Foresight
from compute_node.predict.layer_timer import LayerTimer
from compute_node.predict.predictor import Seen
from compute_node.predict.prefetcher import Prefetcher
from compute_node.store.memory import Borrowed
from compute_node.store.session import SessionLost
from proto.expert import EXACT_VARIANT, ExpertKey

logger = logging.getLogger(__name__)


class LocalBackend:
    """What is resident is computed while the rest is read. In decode the next layers' experts are
    guessed and read ahead.

    small_variant: of records that are read where fewer bits will do
    """

    def __init__(
        self,
        layer: int,
        cache: ExpertCache,
        prefetcher: Prefetcher,
        timer: LayerTimer,
        small_variant: str = EXACT_VARIANT,
    ) -> None:
        self.resident = _ResidentOf(layer, cache)
        self._layer, self._cache = layer, cache
        self._prefetcher, self._timer = prefetcher, timer
        self._small_variant = small_variant
        self._moved = set[ExpertKey]()  # read ahead, and not used yet

    def run(
        self,
        step: Step,
        hidden: Tensor,
        route: Route,
        experts: Sequence[int],
        sums: Sequence[Sum],
        small: Collection[int] = (),
    ) -> set[int]:
        if step.gates is not None:
            gates = step.gates[self._layer].double().mean(dim=0)  # one step, whatever its rows
            self._cache.chooser.weigh(self._layer, gates.numpy())
        self._moved.difference_update([ExpertKey(self._layer, expert) for expert in experts])
        if step.batch.is_decode:
            self._cache.room.answers.note(ExpertKey(self._layer, expert) for expert in experts)
            return self._run(step, hidden, experts, sums, small)
        hits = set[int]()
        for number, portion in enumerate(portions(experts, self.resident, step.num_portions())):
            if number:
                step.give_way()
            with self._cache.room.sparing_answers():
                hits |= self._run(step, hidden, portion, sums, small)
        return hits

    @property
    def waits(self) -> Waits:
        """For experts, and for other boxes."""
        return self._cache.waits

    @property
    def read_s(self) -> float:
        """That reading an expert takes; 0: not known yet."""
        return self._cache.waits.read_s

    def here(self, small: Collection[int]) -> HereOf:
        """What of the layer needs no read, and how long the rest takes. small: as of `run`"""
        foresight = self._prefetcher.foresight
        return HereOf(self._layer, self._cache, foresight, self._moved, small)

    def read_ahead(self, experts: Sequence[int]) -> None:
        """Have these read for later steps, as far as there is room."""
        keys = [ExpertKey(self._layer, expert) for expert in experts]
        fresh = [key for key in keys if key not in self._cache]
        try:
            self._moved.update(self._cache.read_ahead(self._layer, fresh, (), len(fresh)))
        except SessionLost as error:  # the next step opens another
            logger.warning("nothing read ahead", extra={"reason": str(error)})

    def run_apart(self, step: Step, experts: Sequence[int], sums: Sequence[Sum]) -> set[int]:
        """Once more in a step: add these, too. As `run`, and nothing is guessed."""
        hits, waves = self._cache.step(self._layer, experts, step.check)
        for wave in waves:
            add_wave(sums, wave)
        return hits

    def _run(
        self,
        step: Step,
        hidden: Tensor,
        experts: Sequence[int],
        sums: Sequence[Sum],
        small: Collection[int],
    ) -> set[int]:
        meanwhile = self.meanwhile(step, sums)
        variants = dict.fromkeys(small, self._small_variant)
        hits, waves = self._borrow(step, experts, hidden, sums, meanwhile, variants)
        if step.run_ahead is not None and step.run_ahead.always:
            meanwhile(lambda: False)
        if step.seen is not None:
            waves = self._keeping(step.seen, step, hidden, sums[0], hits, waves)
        for wave in waves:
            step.num_small += sum(not borrowed.is_exact for borrowed in wave)
            add_wave(sums, wave)
        return hits

    def _borrow(
        self,
        step: Step,
        experts: Sequence[int],
        hidden: Tensor,
        sums: Sequence[Sum],
        meanwhile: Meanwhile,
        small: Mapping[int, str],
    ) -> tuple[set[int], Iterator[list[Borrowed]]]:
        """Where it looks ahead, guesses about this layer are settled, the next layers' are made."""
        layer, prefetcher = self._layer, self._prefetcher
        if not step.looks_ahead:
            self._timer.leave()
            if step.loans is not None:
                return step.loans.step(layer, experts, step.check)
            return self._cache.step(layer, experts, step.check, small=small)
        used = [ExpertKey(layer, expert) for expert in experts]
        settled = prefetcher.settle(layer, used, hidden)
        self._timer.enter(layer, settled)
        if step.run_ahead is not None:
            step.run_ahead.reached(layer, used)
        has_misses, has_hits = settled.num_misses > 0, settled.num_misses < len(experts)
        seen = Seen(layer, hidden, step.streams.get(layer) if has_hits else None)
        looks = Looks(prefetcher, seen, sums, waits=has_hits and has_misses)
        # Guesses of these are better.
        is_foreseen = step.shadow is not None or (step.run_ahead is not None and has_misses)
        return self._cache.step(
            layer,
            experts,
            step.check,
            prefetcher.take_disproved,
            tuple if is_foreseen else looks.next,
            meanwhile,
        )

    def _keeping(
        self,
        kept: dict[int, Seen],
        step: Step,
        hidden: Tensor,
        one: Sum,
        hits: set[int],
        waves: Iterator[list[Borrowed]],
    ) -> Iterator[list[Borrowed]]:
        """Keep what predictors can go by once the resident experts are computed."""
        seen = kept[self._layer] = Seen(self._layer, hidden)
        for number, wave in enumerate(waves):
            if number == 0 and hits:
                yield wave
                stream, output = step.streams.get(self._layer), one.so_far()
                kept[self._layer] = replace(seen, stream=stream, output=output)
                continue
            yield wave

    def meanwhile(self, step: Step, sums: Sequence[Sum]) -> Meanwhile:
        """What to do while experts are awaited."""
        run_ahead = step.run_ahead
        if run_ahead is None or len(sums) > 1:
            return sleep

        def meanwhile(arrived: Callable[[], bool]) -> None:
            so_far = sums[0].so_far()
            if so_far is not None:
                run_ahead.run(self._layer, so_far, arrived)

        return meanwhile


@dataclass(frozen=True)
class HereOf:
    """One layer's step. foreseen, moved: what was read ahead, by a guess and for good; small:
    experts that a record of fewer bits will do for
    """

    layer: int
    cache: ExpertCache
    foreseen: Foresight
    moved: Container[ExpertKey]
    small: Collection[int]

    def has(self, expert: int) -> bool:
        key = ExpertKey(self.layer, expert)
        if key in self.cache or key in self.foreseen or key in self.moved:
            return True
        return expert in self.small and self.cache.holds(key)

    def read_s(self, expert: int) -> float:
        parts = self.cache.capacity.num_parts if expert in self.small else 1
        return self.cache.waits.read_s / parts


@dataclass(frozen=True)
class _ResidentOf:
    """Experts of one layer of which a record is in the cache, exact or small."""

    layer: int
    cache: ExpertCache

    def __contains__(self, expert: object) -> bool:
        return isinstance(expert, int) and self.cache.holds(ExpertKey(self.layer, expert))
