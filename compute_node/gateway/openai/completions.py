"""/v1/completions: text that goes on from a prompt."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from compute_node.client.result import Piece
from compute_node.gateway.answer import Answer, Asked, text_of
from compute_node.gateway.desk import Desk
from compute_node.gateway.formats.choose import PLAIN
from compute_node.gateway.openai.documents import Head, about, ending, event, failed, usage_of
from compute_node.gateway.openai.fields import Generated
from compute_node.gateway.openai.log_probs import CompletionLogProbs
from compute_node.gateway.refusals import Refused
from compute_node.gateway.reply import reply

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_MAX_LIKELIEST = 5
_PREFIX, _KIND = "cmpl", "text_completion"


class CompletionBody(Generated):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=_MAX_LIKELIEST)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def check(self) -> None:
        super().check()
        if self.echo:
            raise Refused("echo: the prompt is not repeated: leave it out", param="echo")
        if self.best_of not in (None, 1):
            raise Refused(f"best_of is {self.best_of}: one answer is given", param="best_of")
        if self.suffix:
            raise Refused("suffix: text is only gone on from", param="suffix")

    def one_prompt(self) -> str | list[int]:
        """Raises Refused for several."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise Refused(f"{len(prompt)} prompts: send one a request", param="prompt")
            prompt = prompt[0]
        if not prompt:
            raise Refused("the prompt is empty", param="prompt")
        found: str | list[int] = prompt
        return found

    def options(self) -> dict[str, Any]:
        """As the node's client takes them."""
        return {
            **self.sampling(),
            "max_tokens": self.max_tokens or _DEFAULT_MAX_TOKENS,
            "log_probs": self.logprobs,
        }


async def completions(request: Request, desk: Desk) -> ASGIApp:
    """Raises what the request is refused for, before any status is sent."""
    async with desk.bodies.parsed(request, CompletionBody) as body:
        body.check()
        head = Head(_PREFIX, _KIND, await desk.node.checked(body.model))
        asked = Asked(body.one_prompt(), body.options(), PLAIN)
    events = partial(_events, head=head, wants_usage=body.wants_usage) if body.stream else None
    return await reply(request, desk, asked, partial(_whole, head=head), events, failed)


async def _whole(answer: Answer, head: Head) -> Response:
    steps = [step async for step in answer.steps()]
    text = "".join(text_of(step.said) for step in steps)
    pieces = [step.scored for step in steps if step.scored is not None]
    log_probs = CompletionLogProbs().document(pieces) if pieces else None
    result = answer.result
    choice = _choice(text, log_probs, result.finish_reason)
    return JSONResponse(head.document([choice], usage=usage_of(result), flashmoe=about(result)))


async def _events(answer: Answer, head: Head, wants_usage: bool) -> AsyncGenerator[str, None]:
    more: dict[str, Any] = {"usage": None} if wants_usage else {}
    log_probs, pieces = CompletionLogProbs(), list[Piece]()
    async for step in answer.steps():
        if step.scored is not None:
            pieces.append(step.scored)
        if text := text_of(step.said):
            choice = _choice(text, log_probs.document(pieces) if pieces else None)
            yield event(head.document([choice], **more))
            pieces = []
    result = answer.result
    last = _choice("", log_probs.document(pieces) if pieces else None, result.finish_reason)
    for one in ending(head, last, result, wants_usage):
        yield one


def _choice(text: str, log_probs: Any, finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": log_probs, "finish_reason": finish_reason}
