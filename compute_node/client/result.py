"""A generation as a Python user meets it: pieces of text as they come, then what it cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import grpc

from proto import compute_node_pb2 as pb
from proto import errors
from proto.access import RecordedStep


@dataclass(frozen=True)
class TokenLogProb:
    """text: of this token alone; log_prob: natural logarithm, by the model's logits as they are"""

    token_id: int
    text: str
    log_prob: float


@dataclass(frozen=True)
class Piece:
    """One token. text may be empty while a character or a stop string is incomplete.

    drawn, likeliest: its probability, and those of the likeliest at its place, where asked for
    """

    token_id: int
    text: str
    drawn: TokenLogProb | None = None
    likeliest: tuple[TokenLogProb, ...] = ()


@dataclass(frozen=True)
class Phase:
    """What prefill or decode of one request cost."""

    tokens: int
    hits: int
    misses: int
    bytes_read: int
    stall_s: float
    wall_s: float
    uncovered_s: float = 0.0
    device_s: float = 0.0
    substituted: int = 0
    skipped: int = 0
    small: int = 0
    checks: int = 0
    check_s: float = 0.0
    check_bytes: int = 0

    @property
    def hit_ratio(self) -> float:
        """Hits over routed experts; 0 when nothing was routed."""
        total = self.hits + self.misses
        return self.hits / total if total else 0.0


@dataclass(frozen=True)
class ScoredToken:
    """log_prob: natural logarithm of its probability, given what came before it in its part
    of the text

    kl:     nats a token, of the exact logits against the lossy ones; None: it was not checked
    agrees: both find the same token likeliest
    """

    token_id: int
    log_prob: float
    kl: float | None = None
    agrees: bool | None = None


def scored_of(reply: pb.ScoreReply) -> ScoredToken:
    return ScoredToken(
        reply.id,
        reply.log_prob,
        reply.kl if reply.HasField("kl") else None,
        reply.agrees if reply.HasField("agrees") else None,
    )


@dataclass(frozen=True)
class QualityEstimate:
    """Of a route's tokens, by those that were checked since it came into force; each bound holds at
    every moment, at 95 %.

    kl:   mean nats a token, of the exact distribution against the lossy one
    top1: share of tokens whose likeliest successor is the exact one
    """

    route: str
    checks: int
    kl: float
    kl_low: float
    kl_high: float
    top1: float
    top1_low: float
    top1_high: float


@dataclass(frozen=True)
class Result:
    """A finished generation.

    warnings: what to know of it, a sentence each
    quality:  the budget it kept to, or exact; empty: it named a route
    routes:   its decode steps by route, "" is exact
    estimate: of the budget's route in force at the end; None: nothing was checked
    steps:    one for each decode step, when recorded
    stop:     the stop string that ended it; empty: something else did
    reused_tokens: of the prompt, whose state was kept from an earlier request
    waited_s: in which others had their turns, since its first
    """

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str
    ttft_s: float
    tokens_per_s: float
    queued_s: float
    prefill: Phase
    decode: Phase
    warnings: tuple[str, ...] = ()
    quality: str = ""
    routes: dict[str, int] = field(default_factory=dict)
    estimate: QualityEstimate | None = None
    steps: list[RecordedStep] = field(default_factory=list, repr=False)
    stop: str = ""
    reused_tokens: int = 0
    waited_s: float = 0.0


class Collected:
    """What a generation has said so far, whatever it is read by.

    prompt_token_ids, prompt_end: there with the first piece; result: at the end
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self.prompt_token_ids: list[int] = []
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._steps: list[RecordedStep] = []
        self.prompt_end = ""
        self.result: Result | None = None

    def cancel(self) -> None:
        """Tell the node to stop; it does so between layers."""
        self._call.cancel()

    def whole(self) -> Result:
        """Once it is exhausted. Raises Unavailable where it ended early."""
        if self.result is None:
            raise errors.Unavailable("the node ended the stream before the result: retry")
        return self.result

    def _take(self, reply: pb.GenerateReply) -> Piece | None:
        match reply.WhichOneof("kind"):
            case "started":
                self.prompt_token_ids = list(reply.started.prompt_token_ids)
                self.prompt_end = reply.started.prompt_end
            case "token":
                self._token_ids.append(reply.token.id)
                self._text.append(reply.token.text)
                return _piece(reply.token)
            case "step_access":
                self._steps.append(RecordedStep.from_pb(reply.step_access))
            case "finished":
                return self._finish(reply.finished)
        return None

    def _finish(self, finished: pb.Finished) -> Piece | None:
        self._text.append(finished.text)
        self.result = Result(
            text="".join(self._text),
            token_ids=self._token_ids,
            prompt_token_ids=self.prompt_token_ids,
            finish_reason=finished.finish_reason,
            ttft_s=finished.ttft_s,
            tokens_per_s=finished.tokens_per_s,
            queued_s=finished.queued_s,
            prefill=_phase(finished.prefill),
            decode=_phase(finished.decode),
            warnings=tuple(finished.warnings),
            quality=finished.quality,
            routes={use.route: use.tokens for use in finished.routes},
            estimate=_estimate(finished),
            steps=self._steps,
            stop=finished.stop,
            reused_tokens=finished.reused_tokens,
            waited_s=finished.waited_s,
        )
        # What was held back belongs to the last token.
        return Piece(self._token_ids[-1], finished.text) if finished.text else None


class Generation(Collected):
    """An iterator over pieces; `result` is there once it is exhausted. Leaving early: call
    `cancel`.
    """

    def __iter__(self) -> Iterator[Piece]:
        """Raises the typed error the node ended with (proto/errors.py)."""
        try:
            for reply in self._call:
                piece = self._take(reply)
                if piece is not None:
                    yield piece
        except grpc.RpcError as error:
            raise errors.from_rpc(error) from None

    def run(self) -> Result:
        """Exhaust the iterator and return the result. Raises as iterating does."""
        for _ in self:
            pass
        return self.whole()


def _piece(token: pb.Token) -> Piece:
    if not token.HasField("drawn"):
        return Piece(token.id, token.text)
    likeliest = tuple(_log_prob(one) for one in token.likeliest)
    return Piece(token.id, token.text, _log_prob(token.drawn), likeliest)


def _log_prob(one: pb.TokenLogProb) -> TokenLogProb:
    return TokenLogProb(one.id, one.text, one.log_prob)


def _estimate(finished: pb.Finished) -> QualityEstimate | None:
    if not finished.HasField("estimate"):
        return None
    found = finished.estimate
    return QualityEstimate(
        **{one.name: getattr(found, one.name) for one in fields(QualityEstimate)}
    )


def _phase(usage: pb.PhaseUsage) -> Phase:
    return Phase(
        usage.tokens,
        usage.hits,
        usage.misses,
        usage.bytes_read,
        usage.stall_s,
        usage.wall_s,
        usage.uncovered_s,
        usage.device_s,
        usage.substituted,
        usage.skipped,
        usage.small,
        usage.checks,
        usage.check_s,
        usage.check_bytes,
    )
