"""Errors as responses, in the shape of the interface that was called."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from compute_node.gateway.refusals import Failure
from proto import errors

_ANTHROPIC = "/v1/messages"


def is_anthropic(path: str) -> bool:
    return path.startswith(_ANTHROPIC)


def failure_response(path: str, error: errors.FlashMoEError) -> JSONResponse:
    failure = Failure.of(error)
    return JSONResponse(document(path, failure), failure.status, failure.headers)


def document(path: str, failure: Failure) -> dict[str, Any]:
    return failure.anthropic_document() if is_anthropic(path) else failure.document()
