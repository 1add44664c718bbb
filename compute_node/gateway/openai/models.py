"""/v1/models: the one that the node serves."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from compute_node.client.description import Description
from compute_node.gateway.node import Node


def models_routes(node: Node) -> list[Route]:
    async def all_models(request: Request) -> Response:
        found = _document(await node.model(), await node.describe())
        return JSONResponse({"object": "list", "data": [found]})

    async def one_model(request: Request) -> Response:
        name = await node.checked(request.path_params["name"])
        return JSONResponse(_document(name, await node.describe()))

    return [Route("/v1/models", all_models), Route("/v1/models/{name:path}", one_model)]


def _document(name: str, description: Description) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "flashmoe",
        "max_model_len": description.max_context_tokens,
        "has_chat_template": bool(description.chat_template),
    }
