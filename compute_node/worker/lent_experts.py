"""Computes experts for main nodes on other boxes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from compute_node.boxes.work import Work
from compute_node.cache.asked import never
from compute_node.cache.expert_cache import ExpertCache
from compute_node.kernels.variant_kernels import VariantKernels
from compute_node.moe.route import Route
from compute_node.moe.sums import Sum, add_wave, made_of, sum_of
from compute_node.store.session import SessionLost
from proto import errors
from proto.expert import ExpertKey
from proto.held_experts import ALL_EXPERTS, HeldExperts
from proto.stats import counter

logger = logging.getLogger(__name__)

_PORTION = 16  # experts of a prompt's layer, between which more urgent work is done
_POLL_S = 0.0005
_PREPARED, _HELP = "flashmoe_worker_prepared", "Experts that were not here and were asked for ahead"


def nothing_else() -> bool:
    """There is no other work."""
    return False


class LentExperts:
    """Experts of one store, through a cache of its own. One thread.

    num_works: requests answered; num_experts: computed in them
    num_right, num_wrong: experts read ahead that were computed then, and that were not
    """

    num_works: int = counter("flashmoe_worker_requests", "Requests answered", key="answered")
    num_experts: int = counter(
        "flashmoe_worker_experts", "Experts computed", key="experts_computed"
    )
    num_right: int = counter(_PREPARED, _HELP, key="prepared_right", outcome="right")
    num_wrong: int = counter(_PREPARED, _HELP, key="prepared_wrong", outcome="wrong")

    def __init__(
        self,
        kernels: Mapping[int, VariantKernels],
        num_experts: int,
        cache: ExpertCache,
        held: HeldExperts = ALL_EXPERTS,
    ) -> None:
        """kernels: by model layer number; num_experts: of a layer; held: by the store"""
        self._kernels, self._num_experts, self._cache = kernels, num_experts, cache
        self.held = held
        self._prepared: dict[int, set[ExpertKey]] = {}  # read ahead, by layer
        self._moved: dict[int, set[ExpertKey]] = {}  # read ahead to be held, by layer
        self._left_out: dict[int, list[ExpertKey]] = {}  # named, and there was no room
        self._disproved: list[ExpertKey] = []
        self._is_prepared = False  # by some main node
        self._layer = -1  # of the latest work
        self.num_read = 0  # experts of it that the cache had not

    @torch.inference_mode()
    def compute(
        self,
        work: Work,
        check: Callable[[], None] = never,
        prepare_next: Callable[[], bool] = nothing_else,
        give_way: Callable[[], None] = never,
    ) -> Tensor:
        """What these experts make of their tokens, with the bits that the main node's processor
        gives if it is of the same kind: [n, D], as `made_of` its sequences.

        prepare_next: called while experts are awaited; prepares for one request, if there is one
        give_way:     called between portions of a prompt's experts; may compute other work

        Raises InvalidRequest for a layer or an expert that the model or the store does not have,
        StoreUnavailable, WeightsDamaged, and what `check` raises.
        """
        self._check(work.layer, work.experts)
        sums = self._sums(work)
        self._layer = work.layer
        self._settle(work.layer, work.experts)
        meanwhile, num_read = partial(self._prepare_until, prepare_next), 0
        for number, portion in enumerate(_portions(work)):
            if number:
                give_way()
            hits, waves = self._cache.step(
                work.layer, portion, check, self._take_disproved, meanwhile=meanwhile
            )
            num_read += len(portion) - len(hits)
            for wave in waves:
                add_wave(sums, wave)
        self._cache.room.leave()
        self.num_read = num_read
        self.num_works += 1
        self.num_experts += len(work.experts)
        return made_of(sums, work.experts)

    def prepare(self, layer: int, experts: Sequence[int]) -> None:
        """Have these read; they will likely be asked for. What finds no room is read once there is
        some. What was prepared of the layer and is not named now is withdrawn.

        Raises InvalidRequest for a layer or an expert that the model or the store does not have.
        """
        self._check(layer, experts)
        self._is_prepared = True
        named = [ExpertKey(layer, expert) for expert in experts]
        before = self._prepared.pop(layer, set())
        wrong = before.difference(named)
        self.num_wrong += len(wrong)
        self._cache.room.expect(layer, named)
        fresh = [key for key in named if key not in before and key not in self._cache]
        self._prepared[layer] = before.difference(wrong)
        self._read_as_fits(layer, fresh, wrong)

    def move_in(self, layer: int, experts: Sequence[int]) -> None:
        """Have these read, to be held like what was computed. What finds no room is left out.

        Raises InvalidRequest as `prepare` does.
        """
        self._check(layer, experts)
        keys = [ExpertKey(layer, expert) for expert in experts]
        fresh = [key for key in keys if key not in self._cache]
        self._moved.setdefault(layer, set()).update(self._read_ahead(layer, fresh, ()))

    def held_of(self, layer: int) -> set[int]:
        """The layer's experts that need no read now, or are being read."""
        ahead = (*self._prepared.get(layer, ()), *self._moved.get(layer, ()))
        return {key.expert for key in ahead}.union(self._cache.room.residents.held_in(layer))

    @property
    def read_s(self) -> float:
        """That reading an expert takes; 0: not known."""
        return self._cache.waits.read_s

    def prepare_left_out(self) -> None:
        """Have that read which found no room before; the nearest layer's first."""
        for layer in sorted(self._left_out, key=lambda layer: (layer <= self._layer, layer)):
            fresh = [key for key in self._left_out[layer] if key not in self._cache]
            self._read_as_fits(layer, fresh, ())

    def forget_prepared(self) -> None:
        """Nobody asks for it any more."""
        for layer in sorted({*self._prepared, *self._left_out}):
            self.prepare(layer, [])
        for layer, keys in self._moved.items():
            self._read_ahead(layer, (), keys)
        self._moved.clear()

    def _sums(self, work: Work) -> list[Sum]:
        """One a sequence, as `RoutedExperts` has them."""
        kernels, rows = self._kernels[work.layer], work.rows
        parts = [work.hidden] if len(rows) == 1 else [work.hidden[one].clone() for one in rows]
        return [
            sum_of(
                kernels,
                self._num_experts,
                hidden,
                Route(*work.chosen_by(one)),
                work.topk_ids[one],
            )
            for hidden, one in zip(parts, rows, strict=True)
        ]

    def _read_as_fits(
        self, layer: int, fresh: Sequence[ExpertKey], wrong: Collection[ExpertKey]
    ) -> None:
        asked = self._read_ahead(layer, fresh, wrong)
        self._prepared.setdefault(layer, set()).update(asked)
        self._left_out[layer] = [key for key in fresh if key not in asked]
        for kept in (self._prepared, self._left_out):
            if not kept[layer]:
                del kept[layer]

    def _read_ahead(
        self, layer: int, fresh: Sequence[ExpertKey], wrong: Collection[ExpertKey]
    ) -> Sequence[ExpertKey]:
        if not fresh and not wrong:
            return ()
        open_keys = (*self._prepared.values(), *self._moved.values())
        num_open = len(fresh) + sum(map(len, open_keys))
        try:
            return self._cache.read_ahead(layer, fresh, list(wrong), num_open)
        except SessionLost as error:  # the next work opens another
            logger.warning("nothing read ahead", extra={"reason": str(error)})
            return ()

    def _settle(self, layer: int, experts: Sequence[int]) -> None:
        """What was read ahead of this layer was right or wrong."""
        prepared = self._prepared.pop(layer, set())
        self._left_out.pop(layer, None)
        self._moved.get(layer, set()).difference_update(
            [ExpertKey(layer, expert) for expert in experts]
        )
        wrong = [key for key in prepared if key.expert not in experts]
        self.num_wrong += len(wrong)
        self.num_right += len(prepared) - len(wrong)
        self._disproved += wrong

    def _take_disproved(self) -> Sequence[ExpertKey]:
        """Wrong guesses that the store still means to read."""
        taken, self._disproved = self._disproved, []
        return taken

    def _prepare_until(self, prepare_next: Callable[[], bool], arrived: Callable[[], bool]) -> None:
        """While experts are awaited. A worker that nobody has prepared sleeps."""
        while self._is_prepared and not arrived():
            if not prepare_next():
                time.sleep(_POLL_S)

    def _check(self, layer: int, experts: Sequence[int]) -> None:
        if layer not in self._kernels or not all(0 <= e < self._num_experts for e in experts):
            raise errors.InvalidRequest(
                f"the model has no experts {list(experts)} in layer {layer}"
            )
        if missing := [e for e in experts if ExpertKey(layer, e) not in self.held]:
            raise errors.ExpertElsewhere(
                f"this worker's store is a share, without experts {missing} of layer {layer}"
            )


def _portions(work: Work) -> Iterator[Sequence[int]]:
    """A decode step's at once: they are few."""
    size = len(work.experts) if work.is_decode else _PORTION
    for start in range(0, len(work.experts), size):
        yield work.experts[start : start + size]
