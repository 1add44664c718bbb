"""Runs ahead of a decode step that waits for experts: a second pass computes the next layers with
resident experts only, and what their routers choose is read before it is wanted.

Runahead execution of processors (Mutlu et al., HPCA 2003); the emulative prediction of OD-MoE
(arXiv 2512.03927) without a second model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compute_node.cache.expert_cache import ExpertCache
from compute_node.kernels.torch_experts import Tensors
from compute_node.predict.foresight import Foresight
from compute_node.predict.named_reads import NamedReads
from compute_node.run_ahead.fork import Fork, Geometry, can_fork
from compute_node.run_ahead.layers import DecoderLayers
from compute_node.run_ahead.second_pass import Draw, ModelForward, SecondPass, Start
from compute_node.run_ahead.worth import Worth
from proto import errors
from proto.expert import ExpertKey
from proto.stats import counter, fact

logger = logging.getLogger(__name__)

NAME = "run_ahead"
ON = "on"
_SLOTS_A_GUESS = 16  # of these one may be given up: more would cost more hits than they save
_MOST_WRONG = 1  # experts of one token that a second pass may have named wrongly before it ends
_MOST_COMPUTED = 2  # experts of a layer: the heaviest; more see little more, and see it later


@dataclass
class _Token:
    """One decode step. new_draw: makes what draws the tokens after it"""

    token: Tensor
    state: Any
    geometry: Geometry
    new_draw: Callable[[], Draw] | None


@dataclass(eq=False)
class RunAhead:
    """Of one model. One thread.

    forward: of the model: token ids [1, 1] and state
    status:  ON, or why not
    always:  at every layer, whether or not anything is awaited: for tests

    seconds:    of waits that were used
    num_starts: second passes
    num_layers: that they foresaw
    """

    layers: DecoderLayers
    forward: ModelForward
    cache: ExpertCache
    foresight: Foresight
    moe_layers: Sequence[int]
    status: str = fact("whether waits are used to run ahead", key="run_ahead", start=ON)
    always: bool = False
    seconds: float = counter(
        "flashmoe_node_run_ahead_seconds", "Waits that run-ahead used", key="run_ahead_s", start=0.0
    )
    num_starts: int = counter(
        "flashmoe_node_run_ahead_starts", "Second passes", key="run_ahead_starts"
    )
    num_layers: int = counter(
        "flashmoe_node_run_ahead_layers", "Layers they foresaw", key="run_ahead_layers"
    )
    _worth: Worth = field(default_factory=Worth)
    _second: SecondPass | None = None
    _chosen: dict[int, list[ExpertKey]] = field(default_factory=dict)  # by the second, by place
    _num_wrong: int = 0
    _num_layers_before: int = 0  # the second pass foresaw any
    _token: _Token | None = None
    _state: Any = None  # of the latest token's sequence
    _num_tokens: int = 0
    _first: int = 0  # the token that the second pass began with
    _place: int = 0  # layers that the true pass reached, of all tokens
    _arrived: Callable[[], bool] = field(default=lambda: True)

    def __post_init__(self) -> None:
        self._places = {layer: place for place, layer in enumerate(self.moe_layers)}
        self._reads = NamedReads(NAME, self.cache, self.foresight)
        self._most_open = self.cache.room.num_spare + self.cache.capacity.slots // _SLOTS_A_GUESS
        self._lead = len(self.moe_layers) - 1  # beyond, it would need states that are not there yet

    @contextmanager
    def during(
        self, token_id: int, state: Any, new_draw: Callable[[], Draw] | None
    ) -> Iterator[RunAhead | None]:
        """The true pass of one token, on this state. Gives None where it is not run ahead of.

        new_draw: makes what draws the tokens after it, without a trace
        """
        self._num_tokens += 1
        waited_s = self.cache.waits.stall_s + self.cache.waits.away_s
        if self.status != ON or not (self._worth.is_due(waited_s) or self.always):
            self.drop()
            yield None
            return
        if not can_fork(state):
            self.status = f"off: a {type(state).__name__} cannot be forked"
            yield None
            return
        if not self._is_expected(token_id, state):
            self.drop()
        self._state = state
        self._token = _Token(torch.tensor([[token_id]]), state, Geometry(state), new_draw)
        self.layers.keeps = True
        try:
            yield self
        except BaseException:
            self.drop()
            raise
        finally:
            self.layers.forget()
            self._token = None

    def drop(self) -> None:
        """Give the second pass up, if there is one."""
        second, self._second = self._second, None
        if second is not None:
            second.drop()
            self._worth.ended(foresaw=self.num_layers > self._num_layers_before)
        self._chosen.clear()

    def reached(self, layer: int, used: Collection[ExpertKey]) -> None:
        """The true pass's router of `layer` has spoken."""
        self._place = self._num_tokens * len(self.moe_layers) + self._places[layer]
        chosen = self._chosen.pop(self._place, None)
        if self._second is None:
            return
        if chosen is None:  # the true pass has overtaken it
            self.drop()
            return
        self._num_wrong += sum(key not in chosen for key in used)
        if self._num_wrong > _MOST_WRONG:
            self.drop()

    def run(self, layer: int, so_far: Tensor, arrived: Callable[[], bool]) -> None:
        """See `RunsAhead`."""
        if self._token is None:
            return
        self._arrived = arrived
        if self._second is None or self._second.is_over or self.always:
            self.drop()
            self._second = self._start(self._token, layer, so_far)
        with self._worth.measured() as spent:
            self._second.resume()
        self.seconds += spent.seconds
        if (failure := self._second.failure) is not None:
            self._fail(failure)

    def _start(self, token: _Token, layer: int, so_far: Tensor) -> SecondPass:
        self.num_starts += 1
        self._num_layers_before = self.num_layers
        self._first, self._num_wrong = self._num_tokens, 0
        draw = token.new_draw() if token.new_draw is not None else None
        start = Start(token.token, layer, so_far, draw)
        fork = Fork(token.state, token.geometry)
        return SecondPass(self.forward, self.layers, fork, start, self)

    def _fail(self, failure: Exception) -> None:
        """A session that is gone is noticed by the true pass. Anything else would come again."""
        self.drop()
        if isinstance(failure, errors.Unavailable):
            return
        self.status = f"off: it failed ({type(failure).__name__}: {failure})"
        logger.warning("no run-ahead any more, it failed", exc_info=failure)

    def _is_expected(self, token_id: int, state: Any) -> bool:
        """Whether the second pass went on with this token, if it went on with any."""
        second = self._second
        if second is None or state is not self._state:
            return False
        number = self._num_tokens - self._first - 1
        return number < len(second.drawn) and second.drawn[number] == token_id

    def is_due(self) -> bool:
        return self._arrived()

    def foresee(self, num_tokens: int, layer: int, experts: Sequence[int]) -> bool:
        place = (self._first + num_tokens) * len(self.moe_layers) + self._places[layer]
        distance = place - self._place
        if distance > self._lead or len(self.foresight) >= self._most_open:
            return True
        self.num_layers += 1
        chosen = self._chosen[place] = [ExpertKey(layer, expert) for expert in experts]
        self._reads.read(layer, distance, chosen)
        return False

    def usable(self, layer: int, experts: Sequence[int]) -> Mapping[int, Tensors]:
        keys = [ExpertKey(layer, expert) for expert in experts]
        held = [key for key in keys if key in self.cache][:_MOST_COMPUTED]
        return {key.expert: self.cache.held(key).tensors for key in held}
