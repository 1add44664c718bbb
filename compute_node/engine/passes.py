"""Forward passes of sequences through a model, on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from compute_node.cache.asked import never
from compute_node.cache.expert_cache import ExpertCache
from compute_node.engine.job import PromptPart
from compute_node.engine.kv_room import KvRoom
from compute_node.engine.prompt_parts import PromptParts
from compute_node.engine.saved_state import SavedPart, restored
from compute_node.engine.seat import Seat
from compute_node.engine.sequence import SequenceState
from compute_node.engine.usage import Usage
from compute_node.engine.writer import Forecast
from compute_node.evidence.step import Evidence
from compute_node.kernels import heap
from compute_node.model.finite import fault_of, is_usable
from compute_node.model.loaded import LoadedModel
from compute_node.moe.route import is_exact
from compute_node.moe.step import Batch, Foretells, Keeps, Part, Phase, RunsAhead, Step
from compute_node.predict.predictor import EMBEDDING, Seen
from compute_node.predict.shadowed import Shadowed
from compute_node.run_ahead.fork import can_fork
from compute_node.run_ahead.run_ahead import RunAhead
from proto import errors
from proto.stats import fact

_WEIGHED_TOKENS = 16  # a cache grows little; weighing it looks at every tensor


class Passes:
    """Of one model. One thread.

    parts:     how prompts are cut
    room:      memory for sequences' state, and what is kept there
    evidence:  called after every pass; None: nobody learns
    run_ahead: uses the waits of decode steps; None: the thread sleeps
    shadow:    another node that computes decode steps, too; None: there is none. Any thread may set
               another, while sequences are under way
    """

    peak_cache_bytes: int = fact(
        "KV and other state of a sequence, at most", key="cache_bytes", start=0
    )
    reuse: str = fact("whether kept prompts are used", key="kept_prompts", start="on")

    def __init__(
        self,
        loaded: LoadedModel,
        cache: ExpertCache,
        parts: PromptParts,
        room: KvRoom,
        evidence: Evidence | None = None,
        run_ahead: RunAhead | None = None,
    ) -> None:
        self.loaded, self.cache = loaded, cache
        self.parts, self.room = parts, room
        self.run_ahead = run_ahead
        self.shadow: Shadowed | None = None
        self._evidence = evidence

    def prefill(
        self,
        sequence: SequenceState,
        check: Callable[[], None] = never,
        usage: Usage | None = None,
    ) -> Tensor:
        """Compute the prompt. usage: counts what its route changes

        Returns the logits of its last position, [1, V].
        """
        for _ in self.prefill_parts(sequence, Seat(check), usage):
            pass
        assert sequence.logits is not None
        return sequence.logits

    def prefill_parts(
        self, sequence: SequenceState, seat: Seat, usage: Usage | None = None
    ) -> Iterator[PromptPart]:
        """Compute the prompt part by part, from the longest beginning that is kept; its own
        beginning is kept for others. The sequence has the logits of its last position then.
        """
        token_ids = sequence.token_ids
        cuts = [cut for cut in self.parts.cuts(token_ids) if cut < len(token_ids)]
        self._resume(sequence, cuts)
        for end in (*cuts, len(token_ids)):
            if end <= sequence.num_computed:
                continue
            part = token_ids[sequence.num_computed : end]
            sequence.logits, step = self.forward(sequence, part, Phase.PREFILL, seat)
            if usage is not None:
                usage.count(step)
            self._keep(sequence, [cut for cut in cuts if cut <= end], len(part))
            yield PromptPart(sequence.num_computed)

    def decode(
        self, sequences: Sequence[SequenceState], check: Callable[[], None] = never
    ) -> list[Tensor]:
        """One more token of each sequence. Returns the logits of each, [1, V]."""
        return [
            self.forward(sequence, sequence.token_ids[-1:], Phase.DECODE, Seat(check))[0]
            for sequence in sequences
        ]

    @torch.inference_mode()
    def forward_layer(
        self,
        layer: int,
        hidden: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        phase: Phase,
        check: Callable[[], None] = never,
    ) -> Tensor:
        """One MoE layer's routed experts. hidden: [T, D]; topk_ids, topk_weights: [T, K]; phase: of
        all rows. Returns [T, D].

        Raises InvalidRequest for a layer without experts or ids beyond them.
        """
        module = self.loaded.experts_modules.get(layer)
        if module is None:
            raise errors.InvalidRequest(
                f"layer {layer} has no routed experts: use one of "
                f"{list(self.loaded.spec.moe_layers)}"
            )
        if not ((topk_ids >= 0) & (topk_ids < self.loaded.spec.num_experts)).all():
            raise errors.InvalidRequest("topk_ids name experts the model does not have")
        num_rows = 1 if phase is Phase.DECODE else len(hidden)
        part = Part("forward", phase, num_rows, num_rows)
        step = Step(Batch(*[part] * (len(hidden) // num_rows)), check)
        with step.running():
            output: Tensor = module(hidden, topk_ids, topk_weights)
        return output

    @torch.inference_mode()
    def forward(
        self,
        sequence: SequenceState,
        chunk: list[int],
        phase: Phase,
        seat: Seat = Seat(),  # noqa: B008  frozen
        keeps: Keeps = Keeps(),  # noqa: B008  frozen
        forecast: Forecast | None = None,
    ) -> tuple[Tensor, Step]:
        """Compute the sequence's next tokens. forecast: of the tokens after them, to run ahead of
        them too.

        Returns the logits of the last, [1, V], and the step that it was.
        """
        num_computed = sequence.num_computed + len(chunk)
        part = Part(sequence.name, phase, len(chunk), num_computed)
        keeps = replace(keeps, gates=self.cache.chooser.weighs)
        shadow = self._shadow_of(sequence, phase, forecast)
        with self._ahead_of(sequence, chunk, phase, forecast, shadow) as run_ahead:
            policy = sequence.policy_of(phase)
            step = Step(Batch(part), seat.check, keeps, run_ahead, policy=policy)
            step.shadow = shadow
            if phase is Phase.PREFILL:
                step.give_way = lambda: self._give_way(seat)
                step.num_portions = seat.num_portions
            with step.running():
                if phase is Phase.DECODE:
                    self._look_first(step, chunk)
                output = self.loaded.forward(torch.tensor([chunk]), sequence.cache)
        sequence.cache = output.past_key_values
        sequence.num_computed = num_computed
        if len(chunk) > 1 or sequence.num_computed % _WEIGHED_TOKENS == 0:
            self.peak_cache_bytes = max(self.peak_cache_bytes, sequence.cache_bytes)
        logits: Tensor = output.logits[:, -1, :]
        if not is_usable(logits):
            raise fault_of(self.loaded.model, lambda: self._compute_again(sequence, seat.check))
        if self._evidence:
            self._evidence.append(step)
        return logits, step

    def _look_first(self, step: Step, chunk: list[int]) -> None:
        """At what the token says of the first layers, where that is asked for or pays."""
        first_look = self.loaded.first_look
        pays = first_look is not None and step.looks_ahead and first_look.pays
        if step.seen is None and not pays:
            return
        seen = Seen(EMBEDDING, self.loaded.embedded(chunk))
        if step.seen is not None:
            step.seen[EMBEDDING] = seen
        if first_look is not None and pays:
            first_look.look(seen)

    def _ahead_of(
        self,
        sequence: SequenceState,
        chunk: list[int],
        phase: Phase,
        forecast: Forecast | None,
        shadow: Foretells | None,
    ) -> AbstractContextManager[RunsAhead | None]:
        """A decode step may be run ahead of, while it waits, unless a shadow does so."""
        if self.run_ahead is None:
            return nullcontext()
        if phase is not Phase.DECODE or not is_exact(sequence.policy) or shadow is not None:
            self.run_ahead.drop()
            return nullcontext()
        new_draw = forecast.new_draw if forecast is not None else None
        return self.run_ahead.during(chunk[0], sequence.cache, new_draw)

    def _shadow_of(
        self, sequence: SequenceState, phase: Phase, forecast: Forecast | None
    ) -> Foretells | None:
        """None also while it is away."""
        shadow = self.shadow
        if shadow is None or phase is not Phase.DECODE or not is_exact(sequence.policy):
            return None
        token_ids = sequence.token_ids[: sequence.num_computed + 1]
        drawing = forecast.drawing if forecast is not None else None
        is_there = shadow.follow(sequence.name, token_ids, sequence.cache, drawing)
        return shadow if is_there else None

    def _give_way(self, seat: Seat) -> None:
        """Between two portions of a prompt. What others leave is put away."""
        if not seat.others_wait():
            return
        with heap.kept_buffers():
            seat.give_way()
        if self.run_ahead is not None:
            self.run_ahead.drop()

    def _resume(self, sequence: SequenceState, cuts: Sequence[int]) -> None:
        """From what is kept of the prompt's beginning. State that a route changed is kept apart."""
        if self.reuse != "on":
            return
        found = self.room.kept.longest(sequence.token_ids, cuts, sequence.prompt_route)
        if found.parts:
            sequence.cache = restored(found.parts)
            sequence.num_computed = sequence.num_reused = found.num_tokens

    def _keep(self, sequence: SequenceState, cuts: Sequence[int], num_tokens: int) -> None:
        """The part that was computed last, if it ends at a cut."""
        if not cuts or cuts[-1] != sequence.num_computed or self.reuse != "on":
            return
        if not self.room.keeps_prompts:
            return
        if not can_fork(sequence.cache):
            self.reuse = f"off: a {type(sequence.cache).__name__} cannot be kept by the part"
            return
        saved = SavedPart.of(sequence.cache, num_tokens)
        self.room.kept.keep(sequence.token_ids, cuts, sequence.prompt_route, saved)
        self.room.shrink()

    def _compute_again(self, sequence: SequenceState, check: Callable[[], None]) -> None:
        """All positions up to the latest, in chunks, from nothing; the sequence is given up."""
        sequence.cache, cache = None, None
        for start in range(0, sequence.num_computed, self.parts.most):
            end = min(start + self.parts.most, sequence.num_computed)
            part = Part(sequence.name, Phase.PREFILL, end - start, end)
            with Step(Batch(part), check).running():
                token_ids = torch.tensor([sequence.token_ids[start:end]])
                cache = self.loaded.forward(token_ids, cache).past_key_values
