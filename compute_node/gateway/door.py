"""What stands before every route: who may pass, what is counted, and a line in the log without any
text of a prompt or an answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from compute_node.gateway.failures import failure_response
from compute_node.gateway.keys import Keys
from compute_node.gateway.refusals import Refused
from compute_node.gateway.stats import GatewayStats
from proto.rpc import is_loopback

logger = logging.getLogger("gateway.access")

GONE = 499  # as nginx has it: the client left before it was answered
_PUBLIC = ("/health/", "/page/")
_PUBLIC_PAGES = ("/", "/favicon.ico")
_MAX_CLIENT_CHARACTERS = 120


@dataclass
class Passage:
    """One request on its way. client: whose turn it is, for fair shares"""

    client: str
    started_s: float = field(default_factory=time.perf_counter)
    status: int = GONE

    def took_ms(self) -> float:
        return round((time.perf_counter() - self.started_s) * 1e3, 3)


class Door:
    """Before `app`. origins: of web pages that may use it, "*": all"""

    def __init__(
        self, app: ASGIApp, keys: Keys, origins: Collection[str], stats: GatewayStats
    ) -> None:
        self._app, self._keys, self._origins, self._stats = app, keys, origins, stats

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} is served")
        headers = Headers(scope=scope)
        passage = Passage(_client(scope, headers))

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                passage.status = message["status"]
            await send(message)

        self._stats.under_way += 1
        try:
            app = self._guarded(scope, headers, passage)
            await app(scope, receive, noted)
        finally:
            self._stats.under_way -= 1
            self._stats.count(passage.status)
            _log(scope, passage)

    def _guarded(self, scope: Scope, headers: Headers, passage: Passage) -> ASGIApp:
        """The application, or what refuses."""
        try:
            self._check(scope["path"], headers, passage)
        except Refused as error:
            return failure_response(scope["path"], error)
        scope.setdefault("state", {})["client"] = passage.client
        return self._app

    def _check(self, path: str, headers: Headers, passage: Passage) -> None:
        """Raises Refused. The client of a key is the key."""
        if path.startswith(_PUBLIC) or path in _PUBLIC_PAGES:
            return
        if not self._keys.are_needed:
            _check_host(headers)
            self._check_origin(headers)
            return
        client = self._keys.admit(headers)
        if client is None:
            raise Refused(
                "no valid API key: send it as `Authorization: Bearer KEY`",
                status=401,
                code="invalid_api_key",
            )
        passage.client = client

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        """Without keys, a page of another site must not use it through its visitor's browser."""
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin in self._origins:
            return
        if urlsplit(origin).netloc != headers.get("host"):
            raise Refused(
                f"pages of {origin} may not use this server: allow them with --cors-origin",
                status=403,
                code="origin_not_allowed",
            )


def _check_host(headers: Mapping[str, str]) -> None:
    """Without keys, a name that somebody else lets point here must not lead here."""
    host = headers.get("host", "localhost")
    if not is_loopback(host if ":" in host.rpartition("]")[2] else f"{host}:80"):
        raise Refused(
            f"{host} is no name of this machine's own: use localhost, or API keys",
            status=403,
            code="host_not_allowed",
        )


def _client(scope: Scope, headers: Headers) -> str:
    """Programs of one machine take turns too: each has its own User-Agent."""
    address = (scope.get("client") or ("unknown", 0))[0]
    return f"{address} {headers.get('user-agent', '')}"[:_MAX_CLIENT_CHARACTERS]


def _log(scope: Scope, passage: Passage) -> None:
    facts: dict[str, Any] = {
        "method": scope["method"],
        "path": scope["path"],
        "status": passage.status,
        "client": passage.client,
        "took_ms": passage.took_ms(),
    }
    logger.info("request", extra=facts)
