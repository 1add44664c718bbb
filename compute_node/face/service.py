"""The gRPC face of the node: translates messages, and no more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from typing import Any

import torch

from compute_node.boxes.work import bytes_of
from compute_node.client.result import ScoredToken
from compute_node.client.sampling_options import SamplingOptions
from compute_node.engine import engine as core
from compute_node.engine.chat import Chat, encode_chat, template_of
from compute_node.engine.compute_thread import ComputeThread
from compute_node.engine.grammar import HeldAnswer
from compute_node.engine.job import Job, PromptPart, Work
from compute_node.engine.log_probs import MAX_LIKELIEST, LogProb
from compute_node.engine.request import Request
from compute_node.engine.scoring import ScoredText, check_text, score
from compute_node.engine.seat import Seat
from compute_node.engine.text import encode_prompt, end_texts
from compute_node.engine.writer import Token
from compute_node.evidence.accesses import Recording
from compute_node.face.heat import heat_of
from compute_node.face.stats import NodeStats
from compute_node.moe.route import is_exact
from compute_node.moe.routes.rules import policy_of
from compute_node.moe.step import Phase
from compute_node.quality.guard import Guard
from compute_node.quality.guards import Guards
from compute_node.quality.turns import OneRoute, Rung, Turns
from proto import compute_node_pb2 as pb
from proto import compute_node_pb2_grpc as pb_grpc
from proto import errors
from proto import stats_pb2 as stats_pb
from proto.access import RecordedStep
from proto.quality import EXACT_NAME, Budget

SERVICE_NAME = "flashmoe.v1.ComputeNode"
_DEFAULT_MAX_TOKENS = 128
_DEFAULT_SCORE_TOKENS = 512
_MAX_SCORED_CHARACTERS = 1 << 20
_MAX_STOPS = 16


class ComputeNodeService(pb_grpc.ComputeNodeServicer):
    """quality: the budget of requests that name neither one nor a route"""

    def __init__(
        self,
        engine: core.Engine,
        compute: ComputeThread,
        stats: NodeStats,
        guards: Guards,
        quality: str = EXACT_NAME,
    ) -> None:
        self._guards, self._quality = guards, quality
        self._engine = engine
        self._compute = compute
        self._stats = stats

    async def Generate(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateReply]:
        with self._stats.traffic.request() as counted:
            wanted, prompt_end = await self._translate(request, context.peer())
            self._engine.limits.check(wanted)
            self._stats.traffic.requests += 1

            def answer(seat: Seat) -> Iterator[core.Event | PromptPart]:
                return self._engine.answer(wanted, seat)

            work = Work(answer, wanted.client, wanted.num_tokens)
            jobs = self._compute.run(work, context.time_remaining())
            yield pb.GenerateReply(
                started=pb.Started(prompt_token_ids=wanted.token_ids, prompt_end=prompt_end)
            )
            try:
                async for job, event in jobs:
                    if isinstance(event, Token):
                        counted.token(job.queued_s, len(wanted.token_ids))
                    yield _reply(event, job, wanted)
            finally:
                await jobs.aclose()  # type: ignore[attr-defined]

    async def Score(self, request: pb.ScoreRequest, context: Any) -> AsyncIterator[pb.ScoreReply]:
        token_ids = await asyncio.to_thread(self._scored_ids, request)
        text = ScoredText(
            tuple(token_ids[: request.max_tokens or None]),
            request.context_tokens or _DEFAULT_SCORE_TOKENS,
        )
        check_text(self._engine, text)
        turns = self._turns(request)
        self._stats.traffic.requests += 1

        def scored(seat: Seat) -> Iterator[ScoredToken]:
            return score(self._engine, text, turns, seat.check)

        num_tokens = max(len(part) for part in text.parts)
        work = Work(scored, context.peer(), num_tokens)
        jobs = self._compute.run(work, context.time_remaining())
        try:
            async for _, token in jobs:
                yield pb.ScoreReply(
                    id=token.token_id,
                    log_prob=token.log_prob,
                    kl=token.kl,
                    agrees=token.agrees,
                )
        finally:
            await jobs.aclose()  # type: ignore[attr-defined]

    async def Forward(self, request: pb.ForwardRequest, context: Any) -> pb.ForwardReply:
        hidden, topk_ids, topk_weights = self._tensors(request)
        phase = Phase.DECODE if request.is_decode else Phase.PREFILL

        def layer(seat: Seat) -> Iterator[torch.Tensor]:
            yield self._engine.forward_layer(
                request.layer, hidden, topk_ids, topk_weights, phase, seat.check
            )

        output = torch.empty(0)
        work = Work(layer, context.peer())
        async for _, result in self._compute.run(work, context.time_remaining()):
            output = result
        return pb.ForwardReply(hidden_states=bytes_of(output))

    async def Stats(self, request: stats_pb.StatsRequest, context: Any) -> stats_pb.Snapshot:
        return self._stats.snapshot()

    async def Describe(
        self, request: pb.NodeDescriptionRequest, context: Any
    ) -> pb.NodeDescription:
        engine, tokenizer = self._engine, self._engine.loaded.tokenizer
        return pb.NodeDescription(
            model=engine.model_dir.name,
            fingerprint=engine.loaded.spec.fingerprint,
            max_context_tokens=engine.limits.max_context_tokens,
            trained_tokens=engine.limits.trained_tokens or 0,
            chat_template=template_of(tokenizer),
            end_texts=end_texts(tokenizer, engine.eos_ids),
            quality=self._quality,
            grammar=engine.grammars.status,
        )

    async def Heat(self, request: pb.HeatRequest, context: Any) -> pb.HeatReply:
        return heat_of(self._engine)

    async def _translate(self, request: pb.GenerateRequest, peer: str) -> tuple[Request, str]:
        """What is wanted, and the last characters of a chat's prompt."""
        if len(request.stop) > _MAX_STOPS:
            raise errors.InvalidRequest(f"{len(request.stop)} stop strings, at most {_MAX_STOPS}")
        # Tokenising megabytes takes seconds: not on the event loop. Nor a grammar's milliseconds.
        token_ids, prompt_end = await asyncio.to_thread(self._prompt_ids, request)
        held = await asyncio.to_thread(self._held, request, prompt_end)
        token_ids = token_ids[: request.max_prompt_tokens or None]
        wanted = Request(
            token_ids=tuple(token_ids),
            max_tokens=self._max_tokens(request, len(token_ids)),
            sampling=SamplingOptions.from_pb(request.sampling),
            stop=tuple(request.stop),
            stop_token_ids=frozenset(request.stop_token_ids),
            ignore_eos=request.ignore_eos,
            skip_special_tokens=not request.show_special_tokens,
            recording=_recording(request),
            policy=policy_of(request.route),
            route=request.route,
            guard=self._guard(request),
            route_prompts=request.route_prompts,
            client=request.client or peer,
            log_probs=_log_probs(request),
            held=held,
        )
        return wanted, prompt_end

    def _held(self, request: pb.GenerateRequest, prompt_end: str) -> HeldAnswer | None:
        if not request.HasField("grammar"):
            return None
        return self._engine.grammars.begin(request.grammar, prompt_end, request.ignore_eos)

    def _max_tokens(self, request: pb.GenerateRequest, num_prompt: int) -> int:
        given = request.max_tokens if request.HasField("max_tokens") else None
        if request.fits_context:
            return self._engine.limits.fitting_tokens(num_prompt, given)
        return _DEFAULT_MAX_TOKENS if given is None else given

    def _guard(self, request: pb.GenerateRequest | pb.ScoreRequest) -> Guard | None:
        """None: it is exact, or goes by a route. Raises InvalidRequest."""
        if request.route and request.quality:
            raise errors.InvalidRequest("give a route or a quality budget, not both")
        budget = Budget.parse(EXACT_NAME if request.route else request.quality or self._quality)
        return self._guards.of(budget) if budget.fraction else None

    def _turns(self, request: pb.ScoreRequest) -> Turns:
        """Raises InvalidRequest."""
        if (guard := self._guard(request)) is None:
            policy = policy_of(request.route)
            self._engine.limits.check_route(policy)
            return OneRoute(Rung(request.route, policy), request.check_every)
        if request.check_every:
            raise errors.InvalidRequest(
                "a quality budget says itself what is checked: give a route"
            )
        return guard

    def _prompt_ids(self, request: pb.GenerateRequest) -> tuple[list[int], str]:
        """And the last characters of a chat's prompt."""
        tokenizer = self._engine.loaded.tokenizer
        match request.WhichOneof("input"):
            case "prompt":
                self._engine.limits.check_characters(len(request.prompt))
                return encode_prompt(tokenizer, request.prompt), ""
            case "token_ids":
                return list(request.token_ids.ids), ""
            case "chat":
                self._engine.limits.check_characters(_num_characters(request.chat))
                return encode_chat(tokenizer, Chat.from_pb(request.chat))
        raise errors.InvalidRequest("give a prompt, token_ids or chat messages")

    def _scored_ids(self, request: pb.ScoreRequest) -> list[int]:
        if request.WhichOneof("input") == "token_ids":
            return list(request.token_ids.ids)
        if len(request.text) > _MAX_SCORED_CHARACTERS:
            raise errors.InvalidRequest(
                f"the text has {len(request.text)} characters, at most {_MAX_SCORED_CHARACTERS} "
                "are scored at once: send it in parts"
            )
        return encode_prompt(self._engine.loaded.tokenizer, request.text)

    def _tensors(
        self, request: pb.ForwardRequest
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden [T, D], ids [T, K], weights [T, K]. Raises InvalidRequest for wrong sizes."""
        loaded = self._engine.loaded
        num_tokens, top_k = request.num_tokens, loaded.spec.top_k
        self._engine.limits.check_rows(num_tokens)
        want = {
            "hidden_states": num_tokens * loaded.hidden_size * loaded.dtype.itemsize,
            "topk_ids": num_tokens * top_k * 4,
            "topk_weights": num_tokens * top_k * 4,
        }
        for name, length in want.items():
            if num_tokens == 0 or len(getattr(request, name)) != length:
                raise errors.InvalidRequest(
                    f"{name} has {len(getattr(request, name))} bytes, {num_tokens} tokens need "
                    f"{length}"
                )
        hidden = torch.frombuffer(bytearray(request.hidden_states), dtype=loaded.dtype)
        ids = torch.frombuffer(bytearray(request.topk_ids), dtype=torch.int32).long()
        weights = torch.frombuffer(bytearray(request.topk_weights), dtype=torch.float32)
        return (
            hidden.view(num_tokens, loaded.hidden_size),
            ids.view(num_tokens, top_k),
            weights.view(num_tokens, top_k),
        )


def _num_characters(chat: pb.ChatMessages) -> int:
    messages = (m.content + m.tool_calls + m.reasoning for m in chat.messages)
    return len(chat.tools) + sum(map(len, messages))


def _log_probs(request: pb.GenerateRequest) -> int | None:
    if not request.HasField("log_probs"):
        return None
    if request.log_probs > MAX_LIKELIEST:
        raise errors.InvalidRequest(
            f"log_probs of {request.log_probs} tokens at each place: ask for at most "
            f"{MAX_LIKELIEST}"
        )
    return request.log_probs


def _recording(request: pb.GenerateRequest) -> Recording | None:
    if not request.HasField("recording"):
        return None
    wanted = request.recording
    return Recording(wanted.router_scores, wanted.predictions or wanted.inputs, wanted.inputs)


def _quality(wanted: Request) -> str:
    """The budget that it keeps to; empty: it names a route."""
    if wanted.guard is not None:
        return str(wanted.guard.budget)
    return EXACT_NAME if is_exact(wanted.policy) else ""


def _token(token: Token) -> pb.Token:
    if token.log_probs is None:
        return pb.Token(id=token.token_id, text=token.text)
    return pb.Token(
        id=token.token_id,
        text=token.text,
        drawn=_log_prob(token.log_probs.drawn),
        likeliest=map(_log_prob, token.log_probs.likeliest),
    )


def _log_prob(one: LogProb) -> pb.TokenLogProb:
    return pb.TokenLogProb(id=one.token_id, text=one.text, log_prob=one.log_prob)


def _reply(event: core.Event, job: Job, wanted: Request) -> pb.GenerateReply:
    if isinstance(event, Token):
        return pb.GenerateReply(token=_token(event))
    if isinstance(event, RecordedStep):
        return pb.GenerateReply(step_access=event.to_pb())
    return pb.GenerateReply(
        finished=pb.Finished(
            finish_reason=event.reason,
            text=event.text,
            ttft_s=event.ttft_s + job.queued_s,
            tokens_per_s=event.tokens_per_s,
            queued_s=job.queued_s,
            prefill=pb.PhaseUsage(**asdict(event.prefill)),
            decode=pb.PhaseUsage(**asdict(event.decode)),
            warnings=event.warnings,
            quality=_quality(wanted),
            routes=[pb.RouteUse(route=name, tokens=num) for name, num in event.routes.items()],
            estimate=pb.QualityEstimate(**asdict(event.estimate)) if event.estimate else None,
            stop=event.stop,
            reused_tokens=event.reused_tokens,
            waited_s=job.waited_s,
        )
    )
