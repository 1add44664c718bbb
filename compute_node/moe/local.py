"""Experts computed in this process, on weights borrowed from the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from compute_node.cache.expert_cache import ExpertCache
from compute_node.moe.step import Step
from compute_node.moe.sums import Sum
from compute_node.predict.layer_timer import LayerTimer
from compute_node.predict.predictor import Seen
from compute_node.predict.prefetcher import Prefetcher
from compute_node.store.memory import Borrowed
from proto.expert import ExpertKey


class LocalBackend:
    """What is resident is computed while the rest is read. In decode the next layers' experts are
    guessed and read ahead.
    """

    def __init__(
        self, layer: int, cache: ExpertCache, prefetcher: Prefetcher, timer: LayerTimer
    ) -> None:
        self.resident = _ResidentOf(layer, cache)
        self._layer, self._cache = layer, cache
        self._prefetcher, self._timer = prefetcher, timer

    def run(
        self, step: Step, hidden: Tensor, experts: Sequence[int], sums: Sequence[Sum]
    ) -> set[int]:
        hits, waves = self._borrow(step, experts, hidden)
        for wave in waves:
            if len(sums) == 1:
                sums[0].add(wave)
                continue
            for one in sums:
                one.add([borrowed for borrowed in wave if borrowed.key.expert in one.experts])
        return hits

    def _borrow(
        self, step: Step, experts: Sequence[int], hidden: Tensor
    ) -> tuple[set[int], Iterator[list[Borrowed]]]:
        """In decode, guesses about this layer are settled, and the next layers' are made."""
        layer, prefetcher = self._layer, self._prefetcher
        if not step.batch.is_decode:
            self._timer.leave()
            return self._cache.step(layer, experts, step.check)
        settled = prefetcher.settle(layer, [ExpertKey(layer, expert) for expert in experts])
        self._timer.enter(layer, settled)
        return self._cache.step(
            layer,
            experts,
            step.check,
            prefetcher.take_disproved,
            lambda: prefetcher.guess(Seen(layer, hidden)),
        )


@dataclass(frozen=True)
class _ResidentOf:
    """Experts of one layer that are in the cache."""

    layer: int
    cache: ExpertCache

    def __contains__(self, expert: object) -> bool:
        return isinstance(expert, int) and ExpertKey(self.layer, expert) in self.cache
