"""The live page, the figures that it shows, and the same for Prometheus."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from compute_node.gateway.page.assets import Asset, load_assets
from compute_node.gateway.page.feed import Feed
from compute_node.live.look import Asker
from proto.process.metrics_page import page_of

_POLICY = "; ".join(
    [
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect")),
        *(f"{kind} 'none'" for kind in ("base-uri", "form-action", "frame-ancestors")),
    ]
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes(asker: Asker, feed: Feed, *, needs_key: bool) -> list[Route]:
    """`/` and its files say nothing of the stack, and come without a key; the others need it."""
    assets = load_assets(needs_key=needs_key)

    async def index(request: Request) -> Response:
        return _answer(request, assets["index.html"])

    async def asset(request: Request) -> Response:
        found = assets.get(request.path_params["name"])
        if found is None:
            raise HTTPException(404)
        return _answer(request, found)

    async def live(request: Request) -> Response:
        """Server-sent events: figures, each second."""
        feed.check_room()
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(feed.frames(), media_type="text/event-stream", headers=headers)

    async def metrics(request: Request) -> Response:
        """Of one daemon, or of the stack's memory. 503 while it is away."""
        name = request.path_params["name"]
        if name not in asker.names:
            raise HTTPException(404)
        page = page_of(await asker.snapshot(name))
        return Response(page, media_type=CONTENT_TYPE_LATEST)

    return [
        Route("/", index),
        Route("/page/{name}", asset),
        Route("/live", live),
        Route("/metrics/{name}", metrics),
    ]


def _answer(request: Request, asset: Asset) -> Response:
    headers = {**_HEADERS, "ETag": asset.tag}
    if request.headers.get("If-None-Match") == asset.tag:
        return Response(status_code=304, headers=headers)
    return Response(asset.data, headers=headers, media_type=asset.media_type)
