"""Errors as responses, in the shape of the interface that was called."""

from __future__ import annotations

from starlette.responses import JSONResponse

from compute_node.gateway.refusals import Failure
from proto import errors

_ANTHROPIC = "/v1/messages"


def failure_response(path: str, error: errors.FlashMoEError) -> JSONResponse:
    failure = Failure.of(error)
    is_anthropic = path.startswith(_ANTHROPIC)
    body = failure.anthropic_document() if is_anthropic else failure.document()
    return JSONResponse(body, failure.status, failure.headers)
