"""One stack with a gateway for all tests of it, and a way to ask it without a client's library."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stack import ServedStack, served


@pytest.fixture(scope="session")
def stack(chat_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedStack]:
    run_dir = tmp_path_factory.mktemp("fm")
    with served(chat_store, run_dir, "--http", "0", "--experts-memory=100%") as found:
        yield found


class Caller:
    """Sends to one gateway."""

    def __init__(self, url: str) -> None:
        self.url = url

    def send(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, Any]:
        """Status, body and headers. body: bytes as they are, else JSON; None: GET"""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, reply.read(), reply.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON."""
        status, data, _ = self.send(path, body, headers)
        return status, json.loads(data)

    def events(self, path: str, body: Any) -> list[Any]:
        """Of a stream; the last is "[DONE]" as text."""
        status, data, headers = self.send(path, {**body, "stream": True})
        assert status == 200, data
        assert headers["content-type"].startswith("text/event-stream")
        lines = [part.removeprefix("data: ") for part in data.decode().split("\n\n") if part]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


@pytest.fixture
def caller(stack: ServedStack) -> Caller:
    return Caller(stack.url)
