"""The routes of the gateway, and what stands before them."""

from __future__ import annotations

import logging

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from compute_node.gateway.node import Node
from compute_node.gateway.openai.models import models_routes
from compute_node.gateway.refusals import Failure, Refused
from proto import errors

logger = logging.getLogger(__name__)


def new_app(node: Node, page: list[Route]) -> Starlette:
    """HTTP over one node. page: routes of the live page"""

    async def ready(request: Request) -> Response:
        """The node behind it takes requests."""
        if await node.is_serving():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "the node is away or draining"}, 503, {"Retry-After": "2"})

    routes = [
        Route("/health/live", live),
        Route("/health/ready", ready),
        *models_routes(node),
        *page,
    ]
    return Starlette(
        routes=routes,
        exception_handlers={
            errors.FlashMoEError: answer_error,
            HTTPException: answer_http_error,
            Exception: answer_defect,
        },
    )


async def live(request: Request) -> Response:
    """The process runs."""
    return JSONResponse({"status": "live"})


async def answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.FlashMoEError)
    failure = Failure.of(error)
    return JSONResponse(failure.document(), failure.status, failure.headers)


async def answer_http_error(request: Request, error: Exception) -> Response:
    """What starlette refuses by itself: no such path, no such method."""
    assert isinstance(error, HTTPException)
    refused = Refused(
        f"{request.method} {request.url.path}: {error.detail.lower()}", status=error.status_code
    )
    headers = dict(error.headers or {})
    return JSONResponse(Failure.of(refused).document(), error.status_code, headers)


async def answer_defect(request: Request, error: Exception) -> Response:
    defect = errors.FlashMoEError(f"a defect of FlashMoE's gateway: {type(error).__name__}")
    return JSONResponse(Failure.of(defect).document(), 500)
