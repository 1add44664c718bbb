"""A decode token once more, with the experts that routers choose, beside the pass that a lossy
route makes of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compute_node.cache.asked import never
from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.loans import Loans
from compute_node.engine.sequence import SequenceState
from compute_node.model.finite import is_usable
from compute_node.moe.step import Batch, Part, Phase, Step
from compute_node.run_ahead.fork import Fork, Geometry, can_fork
from compute_node.run_ahead.layers import DecoderLayers
from compute_node.run_ahead.second_pass import ModelForward
from compute_node.store.session import SessionLost
from proto import errors
from proto.stats import counter, fact

# The lossy pass may never need what is damaged; it opens the session that is lost.
_NO_CHECK = (errors.WeightsDamaged, errors.SlotsExhausted, errors.StaleLease, SessionLost)

logger = logging.getLogger(__name__)

ON = "on"
_PASSES, _HELP = "flashmoe_node_exact_passes", "Tokens computed exactly beside a lossy route"


class ExactPass:
    """Of one model. One thread. It leaves no trace in the sequence, and nothing is learned from it:
    no evidence, no guess.

    status: ON, or why a token cannot be computed once more
    """

    status: str = fact("whether lossy tokens can be checked", key="exact_pass", start=ON)
    num_done: int = counter(_PASSES, _HELP, key="exact_passes", outcome="done")
    num_failed: int = counter(_PASSES, _HELP, key="exact_passes_failed", outcome="failed")

    def __init__(
        self, forward: ModelForward, cache: ExpertCache, layers: DecoderLayers | None
    ) -> None:
        """layers: the model's; None: nobody looked for them"""
        self.loans = Loans(cache)
        self._forward = forward
        self._layers = layers if layers is not None and layers.are_found else None
        if self._layers is None:
            self.status = "off: the model's layers are not in one list"

    @torch.inference_mode()
    def logits(self, sequence: SequenceState, check: Callable[[], None] = never) -> Tensor | None:
        """Of the sequence's latest token, which is not computed yet: [1, V]. None: that cannot be
        done, as `status` or the log says.

        Before the lossy pass, because a layer's state can be forked as long as the token is not in
        it; that takes the memory of one layer.
        Raises StoreUnavailable, and what `check` raises.
        """
        if self._layers is None or not self._can_fork(sequence.cache):
            self.num_failed += 1
            return None
        try:
            logits = self._compute(sequence, self._layers, check)
        except _NO_CHECK as error:
            self._fail(str(error))
            return None
        if not is_usable(logits):
            self._fail("the logits are not finite")
            return None
        self.num_done += 1
        return logits

    def _compute(
        self, sequence: SequenceState, layers: DecoderLayers, check: Callable[[], None]
    ) -> Tensor:
        part = Part(sequence.name, Phase.DECODE, 1, sequence.num_computed + 1)
        apart, state = _apart(sequence.cache)
        layers.second = apart
        try:
            with Step(Batch(part), check, loans=self.loans).running():
                output = self._forward(torch.tensor([sequence.token_ids[-1:]]), state)
        finally:
            layers.second = None
            self.loans.end()
        logits: Tensor = output.logits[:, -1, :]
        return logits

    def _can_fork(self, state: Any) -> bool:
        if state is None or can_fork(state):
            return True
        self.status = f"off: a {type(state).__name__} cannot be forked"
        return False

    def _fail(self, why: str) -> None:
        self.num_failed += 1
        logger.warning("exact pass failed", extra={"reason": why})


class _Apart:
    """Every layer is computed, on a fork of its state."""

    stalled = -1

    def __init__(self, fork: Fork) -> None:
        self.enter, self.leave, self.skip = fork.enter, fork.leave, fork.skip

    def pause_if_due(self) -> None:
        """Nobody waits for this pass."""


def _apart(state: Any) -> tuple[_Apart | None, Any]:
    """What runs the layers on a state of their own, and that state; a sequence that begins has
    none.
    """
    if state is None:
        return None, None
    fork = Fork(state, Geometry(state))
    return _Apart(fork), fork.state
