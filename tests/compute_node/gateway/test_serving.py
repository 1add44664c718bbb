"""`flashmoe serve --http`: a process of its own that starts, is seen, and says what it serves.

Planted faults seen red: no gateway in the plan of memory, an address beyond loopback without keys
where neither the launcher nor the gateway refuses it.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from deploy.settings import ServeSettings
from deploy.stack.stack_plan import plan_stack_memory
from expert_store.manifest.manifest import Manifest
from tests.stack import ServedStack, flashmoe

pytestmark = pytest.mark.system


def get(stack: ServedStack, path: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(f"{stack.url}{path}", timeout=10) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_it_lives_and_names_its_model(stack: ServedStack) -> None:
    assert get(stack, "/health/live") == (200, {"status": "live"})
    assert get(stack, "/health/ready") == (200, {"status": "ready"})
    status, models = get(stack, "/v1/models")
    assert (status, [one["id"] for one in models["data"]]) == (200, ["tiny-chat"])
    assert get(stack, "/v1/models/tiny-chat") == (200, models["data"][0])
    status, body = get(stack, "/v1/models/gpt-4")
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    status, body = get(stack, "/v1/nothing")
    assert (status, body["error"]["type"]) == (404, "not_found_error")


def test_status_shows_it(stack: ServedStack) -> None:
    found = stack.status()["gateway"]
    assert found["health"] == "SERVING"
    assert found["url"] == stack.url


def test_memory_is_planned_for_it(chat_store: Path) -> None:
    manifest = Manifest.load(chat_store)
    settings = [ServeSettings(experts_memory="100%", http=http) for http in (None, "0")]
    without, found = (plan_stack_memory(one, chat_store, manifest, None) for one in settings)
    assert found.parts.keys() - without.parts.keys() == {"gateway"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--http", "0.0.0.0:8000"], "reachable from other hosts: give --api-key-file"),
        (["--http", "nowhere:"], "is no [HOST:]PORT"),
        (["--http", "70000"], "is no [HOST:]PORT"),
        (["--api-key-file", "keys"], "give --http, too"),
    ],
)
def test_what_cannot_be_served_is_refused(
    chat_store: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    result = flashmoe(
        "serve", "--model", str(chat_store), "--experts-memory", "37.5%", "--run-dir",
        str(tmp_path / "run"), *flags,
    )  # fmt: skip
    assert result.returncode == 2
    assert message in result.stderr


def test_a_port_in_use_is_named(stack: ServedStack, chat_store: Path, run_dir: Path) -> None:
    port = stack.url.rsplit(":", 1)[1]
    result = flashmoe(
        "serve", "--model", str(chat_store), "--experts-memory", "37.5%", "--run-dir", str(run_dir),
        "--http", port,
    )  # fmt: skip
    assert result.returncode != 0
    assert f"--http 127.0.0.1:{port} cannot be bound" in result.stderr
