"""The decode loop: prompt chunks, then a token at a time, on one thread.

Takes a list of sequences, computes one after another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compute_node.cache.asked import never
from compute_node.cache.expert_cache import ExpertCache
from compute_node.client.result import QualityEstimate
from compute_node.engine.exact_pass import ON, ExactPass
from compute_node.engine.limits import Limits
from compute_node.engine.lossy import LossyCounts, LossyDecode
from compute_node.engine.request import Request
from compute_node.engine.sequence import SequenceState
from compute_node.engine.usage import Measure, Usage
from compute_node.engine.writer import Token, Writer
from compute_node.evidence.accesses import Recording, recorded
from compute_node.evidence.foretold import foretold
from compute_node.evidence.step import Evidence
from compute_node.model.finite import fault_of, is_usable
from compute_node.model.loaded import LoadedModel
from compute_node.moe.route import is_exact
from compute_node.moe.step import Batch, Keeps, Part, Phase, RunsAhead, Step
from compute_node.predict.predictor import EMBEDDING, Seen
from compute_node.quality.turns import Turns
from compute_node.run_ahead.run_ahead import RunAhead
from compute_node.run_ahead.second_pass import Draw
from proto import errors
from proto.access import RecordedStep
from proto.checkpoint.text_files import load_generation_config
from proto.stats import fact

_WEIGHED_TOKENS = 16  # a cache grows little; weighing it looks at every tensor


@dataclass(frozen=True)
class Finished:
    """text: what was held back and is no stop string; warnings: a sentence each

    routes:   decode steps by what they went by
    estimate: of the guard that said so; None: there was none, or nothing is checked yet
    """

    reason: str
    text: str
    ttft_s: float
    prefill: Usage
    decode: Usage
    warnings: tuple[str, ...] = ()
    routes: Mapping[str, int] = field(default_factory=dict)
    estimate: QualityEstimate | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.decode.tokens / self.decode.wall_s if self.decode.wall_s else 0.0


Event = Token | RecordedStep | Finished


class Engine:
    """Runs sequences through a model. One thread.

    evidence:  called after every pass; None: nobody learns
    run_ahead: uses the waits of decode steps; None: the thread sleeps
    """

    peak_cache_bytes: int = fact(
        "KV and other state of a sequence, at most", key="cache_bytes", start=0
    )

    def __init__(
        self,
        loaded: LoadedModel,
        cache: ExpertCache,
        model_dir: Path,
        max_context_tokens: int,
        prefill_chunk_tokens: int,
        evidence: Evidence | None = None,
        run_ahead: RunAhead | None = None,
    ) -> None:
        self.loaded = loaded
        self.cache = cache
        self.run_ahead = run_ahead
        self._chunk_tokens = prefill_chunk_tokens
        self._evidence = evidence
        self._eos_ids = _eos_ids(loaded.model, model_dir)
        self.limits = Limits(loaded, max_context_tokens, prefill_chunk_tokens)
        layers = run_ahead.layers if run_ahead is not None else None
        self.lossy = LossyCounts()
        self.exact_pass = ExactPass(loaded.forward, cache, layers)
        self._num_sequences = 0

    def generate(self, request: Request, check: Callable[[], None] = never) -> Iterator[Event]:
        """Tokens as they come, each decode step's accesses if they are recorded, then how it ended.
        `check` may raise between layers to abandon the request.

        Raises InvalidRequest, StoreUnavailable, WeightsDamaged, NotFinite, StaleLease, and what
        `check` raises.
        """
        self.limits.check(request)
        try:
            yield from self._generate(request, check)
        finally:
            if self.run_ahead is not None:
                self.run_ahead.drop()

    def _generate(self, request: Request, check: Callable[[], None]) -> Iterator[Event]:
        self._num_sequences += 1
        sequence = SequenceState(
            f"s{self._num_sequences}",
            list(request.token_ids),
            policy=request.policy,
            routes_prompt=request.route_prompts,
        )
        recording = request.recording or Recording()
        keeps = Keeps(recording.router_scores, recording.predictions)
        prefill, decode = Usage(), Usage()
        start_s = time.perf_counter()
        with Measure(self.cache, prefill, len(request.token_ids)):
            logits = self.prefill(sequence, check, prefill)
        writer = Writer(request, self.loaded.tokenizer, self._eos_ids)
        ttft_s = time.perf_counter() - start_s
        lossy = self.lossy_decode(request.turns, decode)
        while True:
            token = writer.next(sequence.token_ids, logits)
            yield token
            if writer.finish_reason:
                break
            with Measure(self.cache, decode, 1):
                logits, step = lossy.step(
                    sequence,
                    lambda: self.forward(
                        sequence,
                        sequence.token_ids[-1:],
                        Phase.DECODE,
                        check,
                        keeps,
                        lambda: writer.forecast(sequence.token_ids),
                    ),
                    check,
                )
            if request.recording:
                yield self._recorded(step, recording)
        text = writer.flush()
        warnings = self.limits.warnings(request) + self._unguarded(request)
        estimate = request.guard.estimate if request.guard is not None else None
        yield Finished(
            writer.finish_reason, text, ttft_s, prefill, decode, warnings, lossy.routes, estimate
        )

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

    def prefill(
        self,
        sequence: SequenceState,
        check: Callable[[], None] = never,
        usage: Usage | None = None,
    ) -> Tensor:
        """Compute the prompt in chunks. usage: counts what its route changes

        Returns the logits of its last position, [1, V].
        """
        logits = torch.empty(0)
        while sequence.num_computed < len(sequence.token_ids):
            start = sequence.num_computed
            chunk = sequence.token_ids[start : start + self._chunk_tokens]
            logits, step = self.forward(sequence, chunk, Phase.PREFILL, check)
            if usage is not None:
                usage.count(step)
        return logits

    def decode(
        self, sequences: Sequence[SequenceState], check: Callable[[], None] = never
    ) -> list[Tensor]:
        """One more token of each sequence. Returns the logits of each, [1, V]."""
        return [
            self.forward(sequence, sequence.token_ids[-1:], Phase.DECODE, check)[0]
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
        check: Callable[[], None] = never,
        keeps: Keeps = Keeps(),  # noqa: B008  frozen
        new_draw: Callable[[], Draw] | None = None,
    ) -> tuple[Tensor, Step]:
        """Compute the sequence's next tokens. new_draw: makes what draws the tokens after them, to
        run ahead of them too.

        Returns the logits of the last, [1, V], and the step that it was.
        """
        num_computed = sequence.num_computed + len(chunk)
        part = Part(sequence.name, phase, len(chunk), num_computed)
        keeps = replace(keeps, gates=self.cache.chooser.weighs)
        with self._ahead_of(sequence, chunk, phase, new_draw) as run_ahead:
            policy = sequence.policy_of(phase)
            step = Step(Batch(part), check, keeps, run_ahead, policy=policy)
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
            raise fault_of(self.loaded.model, lambda: self._compute_again(sequence, check))
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

    def _ahead_of(
        self,
        sequence: SequenceState,
        chunk: list[int],
        phase: Phase,
        new_draw: Callable[[], Draw] | None,
    ) -> AbstractContextManager[RunsAhead | None]:
        """A decode step may be run ahead of, while it waits."""
        if self.run_ahead is None:
            return nullcontext()
        if phase is not Phase.DECODE or not is_exact(sequence.policy):
            self.run_ahead.drop()
            return nullcontext()
        return self.run_ahead.during(chunk[0], sequence.cache, new_draw)

    def _compute_again(self, sequence: SequenceState, check: Callable[[], None]) -> None:
        """All positions up to the latest, in chunks, from nothing; the sequence is given up."""
        sequence.cache, cache = None, None
        for start in range(0, sequence.num_computed, self._chunk_tokens):
            end = min(start + self._chunk_tokens, sequence.num_computed)
            part = Part(sequence.name, Phase.PREFILL, end - start, end)
            with Step(Batch(part), check).running():
                token_ids = torch.tensor([sequence.token_ids[start:end]])
                cache = self.loaded.forward(token_ids, cache).past_key_values


def _eos_ids(model: Any, model_dir: Path) -> frozenset[int]:
    """Tokens that end a text, as the checkpoint's generation config has them."""
    config = load_generation_config(model_dir) or model.generation_config
    eos = config.eos_token_id if config is not None else None
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
