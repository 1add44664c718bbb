"""The routes of the gateway, and what stands before them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from compute_node.gateway.anthropic.messages import messages
from compute_node.gateway.config import GatewayConfig
from compute_node.gateway.desk import Desk
from compute_node.gateway.door import GONE, Door
from compute_node.gateway.failures import failure_response
from compute_node.gateway.keys import Keys
from compute_node.gateway.openai.chat import chat
from compute_node.gateway.openai.completions import completions
from compute_node.gateway.openai.models import models_routes
from compute_node.gateway.refusals import Refused
from compute_node.gateway.stats import GatewayStats
from proto import errors
from proto.process.metrics_page import page_of


def new_app(desk: Desk, config: GatewayConfig, page: list[Route]) -> Starlette:
    """HTTP over one node. page: routes of the live page

    Raises ConfigInvalid for keys that cannot be read.
    """
    door = Middleware(
        Door, keys=Keys.load(config.api_key_file), origins=config.cors_origins, stats=desk.stats
    )
    return Starlette(
        routes=[
            *_health(desk),
            Route("/metrics", _metrics(desk.stats)),
            *models_routes(desk.node),
            _post("/v1/chat/completions", chat, desk),
            _post("/v1/completions", completions, desk),
            _post("/v1/messages", messages, desk),
            *page,
        ],
        middleware=[*_cors(config), door],
        exception_handlers={
            errors.FlashMoEError: _answer_error,
            HTTPException: _answer_http_error,
            Exception: _answer_defect,
        },
    )


def _post(path: str, handle: Callable[[Request, Desk], Awaitable[ASGIApp]], desk: Desk) -> Route:
    async def endpoint(request: Request) -> ASGIApp:
        try:
            return await handle(request, desk)
        except errors.Cancelled:
            desk.note_gone()
            return Response(status_code=GONE)

    return Route(path, endpoint, methods=["POST"])


def _cors(config: GatewayConfig) -> list[Middleware]:
    """Before keys: a browser asks without them whether it may ask."""
    if not config.cors_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    ]


def _health(desk: Desk) -> list[Route]:
    async def live(request: Request) -> Response:
        """The process runs."""
        return JSONResponse({"status": "live"})

    async def ready(request: Request) -> Response:
        """The node behind it takes requests."""
        if await desk.node.is_serving():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "the node is away or draining"}, 503, {"Retry-After": "2"})

    return [Route("/health/live", live), Route("/health/ready", ready)]


def _metrics(stats: GatewayStats) -> Callable[[Request], Awaitable[Response]]:
    async def metrics(request: Request) -> Response:
        """As Prometheus scrapes it."""
        return Response(page_of(stats.snapshot()), media_type=CONTENT_TYPE_LATEST)

    return metrics


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.FlashMoEError)
    return failure_response(request.url.path, error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """What starlette refuses by itself: no such path, no such method."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    refused = Refused(f"{request.method} {path}: {error.detail.lower()}", status=error.status_code)
    response = failure_response(path, refused)
    response.headers.update(error.headers or {})
    return response


async def _answer_defect(request: Request, error: Exception) -> Response:
    """Starlette has it logged."""
    defect = errors.FlashMoEError(f"a defect of FlashMoE's gateway: {type(error).__name__}")
    return failure_response(request.url.path, defect)
