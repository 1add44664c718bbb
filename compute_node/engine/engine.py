"""An answer to a request: its prompt part by part, then a token at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compute_node.cache.asked import never
from compute_node.cache.expert_cache import ExpertCache
from compute_node.client.result import QualityEstimate
from compute_node.engine.exact_pass import ON, ExactPass
from compute_node.engine.grammar import Grammars
from compute_node.engine.job import PromptPart
from compute_node.engine.kv_room import KvRoom
from compute_node.engine.limits import Limits
from compute_node.engine.lossy import LossyCounts, LossyDecode
from compute_node.engine.passes import Passes
from compute_node.engine.prompt_parts import PromptParts, special_ids
from compute_node.engine.request import Request
from compute_node.engine.seat import Seat
from compute_node.engine.sequence import SequenceState
from compute_node.engine.usage import Measure, Usage
from compute_node.engine.writer import Token, Writer
from compute_node.evidence.accesses import Recording, recorded
from compute_node.evidence.foretold import foretold
from compute_node.evidence.step import Evidence
from compute_node.model.loaded import LoadedModel
from compute_node.moe.route import is_exact
from compute_node.moe.step import Keeps, Phase, Step
from compute_node.quality.turns import Turns
from compute_node.run_ahead.run_ahead import RunAhead
from proto.access import RecordedStep
from proto.checkpoint.text_files import load_generation_config

_LEAST_RESIDENT_TOKENS = 32  # of a part of a prompt that ends with a turn of a conversation


@dataclass(frozen=True)
class Finished:
    """text: what was held back and is no stop string; warnings: a sentence each

    routes:   decode steps by what they went by
    estimate: of the guard that said so; None: there was none, or nothing is checked yet
    reused_tokens: of the prompt, whose state was kept from another
    stop:     the stop string that ended it; empty: something else did
    """

    reason: str
    text: str
    ttft_s: float
    prefill: Usage
    decode: Usage
    warnings: tuple[str, ...] = ()
    routes: Mapping[str, int] = field(default_factory=dict)
    estimate: QualityEstimate | None = None
    reused_tokens: int = 0
    stop: str = ""

    @property
    def tokens_per_s(self) -> float:
        return self.decode.tokens / self.decode.wall_s if self.decode.wall_s else 0.0


Event = Token | RecordedStep | Finished


class Engine(Passes):
    """Runs sequences through a model. One thread."""

    def __init__(
        self,
        loaded: LoadedModel,
        cache: ExpertCache,
        model_dir: Path,
        max_context_tokens: int,
        prefill_chunk_tokens: int,
        evidence: Evidence | None = None,
        run_ahead: RunAhead | None = None,
        room: KvRoom | None = None,
    ) -> None:
        """room: None: nothing is kept"""
        parts = _prompt_parts(loaded, cache, prefill_chunk_tokens)
        super().__init__(loaded, cache, parts, room or KvRoom(), evidence, run_ahead)
        self.model_dir, self.eos_ids = model_dir, _eos_ids(loaded.model, model_dir)
        self.limits = Limits(loaded, max_context_tokens, prefill_chunk_tokens)
        self.grammars = Grammars(loaded.tokenizer, self.limits.vocab_size, self.eos_ids)
        layers = run_ahead.layers if run_ahead is not None else None
        self.lossy = LossyCounts()
        self.exact_pass = ExactPass(loaded.forward, cache, layers)
        self._num_sequences = 0

    def generate(self, request: Request, check: Callable[[], None] = never) -> Iterator[Event]:
        """As `answer`, without a word of the prompt's parts."""
        events = self.answer(request, Seat(check))
        return (event for event in events if not isinstance(event, PromptPart))

    def answer(self, request: Request, seat: Seat) -> Iterator[Event | PromptPart]:
        """Each part of the prompt as it is computed, tokens as they come, each decode step's
        accesses if they are recorded, then how it ended. Others may have turns between what it
        yields. `seat.check` may raise between layers to abandon the request.

        Raises InvalidRequest, StoreUnavailable, WeightsDamaged, NotFinite, StaleLease, and what
        `check` raises.
        """
        self.limits.check(request)
        try:
            yield from self._answer(request, seat)
        finally:
            if self.run_ahead is not None:
                self.run_ahead.drop()

    def _answer(self, request: Request, seat: Seat) -> Iterator[Event | PromptPart]:
        self._num_sequences += 1
        sequence = SequenceState(
            f"s{self._num_sequences}",
            list(request.token_ids),
            policy=request.policy,
            routes_prompt=request.route_prompts,
            prompt_route=request.route if request.route_prompts else "",
        )
        with self._followed(sequence):
            yield from self._computed(request, sequence, seat)

    @contextmanager
    def _followed(self, sequence: SequenceState) -> Iterator[None]:
        """By the shadow that is there, for the block; where routers alone choose its experts."""
        if not is_exact(sequence.policy):
            yield
            return
        if (shadow := self.shadow) is not None:
            shadow.begin(sequence.name, sequence.token_ids)
        try:
            yield
        finally:
            if (shadow := self.shadow) is not None:  # perhaps another
                shadow.end(sequence.name)

    def _computed(
        self, request: Request, sequence: SequenceState, seat: Seat
    ) -> Iterator[Event | PromptPart]:
        prefill, start_s = Usage(), time.perf_counter()
        yield from self._prompt(sequence, seat, prefill)
        ttft_s = time.perf_counter() - start_s
        with self.cache.room.answers.answering():
            yield from self._decode(request, sequence, seat, prefill, ttft_s)

    def _decode(
        self,
        request: Request,
        sequence: SequenceState,
        seat: Seat,
        prefill: Usage,
        ttft_s: float,
    ) -> Iterator[Event]:
        """From the prompt's logits on. prefill, ttft_s: what the prompt cost"""
        assert sequence.logits is not None
        logits, decode = sequence.logits, Usage()
        recording = request.recording or Recording()
        keeps = Keeps(recording.router_scores, recording.predictions)
        writer = Writer(request, self.loaded.tokenizer, self.eos_ids)
        lossy = self.lossy_decode(request.turns, decode)
        while True:
            token = writer.next(sequence.token_ids, logits)
            yield token
            if writer.finish_reason:
                break
            with Measure(self.cache, decode):
                decode.tokens += 1
                logits, step = lossy.step(
                    sequence,
                    lambda: self.forward(
                        sequence,
                        sequence.token_ids[-1:],
                        Phase.DECODE,
                        seat,
                        keeps,
                        writer.forecast(sequence.token_ids),
                    ),
                    seat.check,
                )
            if request.recording:
                yield self._recorded(step, recording)
        text = writer.flush()
        warnings = self.limits.warnings(request) + self._unguarded(request)
        estimate = request.guard.estimate if request.guard is not None else None
        yield Finished(
            writer.finish_reason,
            text,
            ttft_s,
            prefill,
            decode,
            warnings,
            lossy.routes,
            estimate,
            sequence.num_reused,
            writer.stop,
        )

    def _prompt(self, sequence: SequenceState, seat: Seat, usage: Usage) -> Iterator[PromptPart]:
        """What it costs is measured, without the turns that others have meanwhile."""
        measure = Measure(self.cache, usage)

        def give_way() -> None:
            with measure.paused():
                seat.give_way()

        parts = self.prefill_parts(sequence, replace(seat, give_way=give_way), usage)
        while True:
            num_before = sequence.num_computed
            with measure:
                part = next(parts, None)
            if part is None:
                return
            usage.tokens += sequence.num_computed - max(num_before, sequence.num_reused)
            yield part

    def _unguarded(self, request: Request) -> tuple[str, ...]:
        """A sentence, where a budget's tokens cannot be checked."""
        if request.guard is None or self.exact_pass.status == ON:
            return ()
        return (
            f"quality {request.guard.budget} is as measured by `flashmoe tune`, and not checked "
            f"while it decodes: {self.exact_pass.status}",
        )

    def lossy_decode(self, turns: Turns, usage: Usage | None = None) -> LossyDecode:
        return LossyDecode(turns, self.exact_pass, self.lossy, usage or Usage())

    def _recorded(self, step: Step, recording: Recording) -> RecordedStep:
        """Raises InvalidRequest for what this model cannot have recorded."""
        access = recorded(self.loaded.spec, step, recording.router_scores)
        if step.seen is None:
            return access
        said = foretold(
            self.loaded.spec,
            self.loaded.prefetcher.predictors,
            self.loaded.routers.next_routers,
            step.seen,
            recording.inputs,
        )
        return replace(access, foretold=said)


def _prompt_parts(loaded: LoadedModel, cache: ExpertCache, most: int) -> PromptParts:
    """Short parts cost little where all experts are resident; elsewhere each reads most of them."""
    is_resident = cache.capacity.slots >= loaded.spec.num_experts_total
    least = min(most, _LEAST_RESIDENT_TOKENS) if is_resident else -(-most // 2)
    return PromptParts(most, least, special_ids(loaded.tokenizer))


def _eos_ids(model: Any, model_dir: Path) -> frozenset[int]:
    """Tokens that end a text, as the checkpoint's generation config has them."""
    config = load_generation_config(model_dir) or model.generation_config
    eos = config.eos_token_id if config is not None else None
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
