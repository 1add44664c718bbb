"""The clients that people use, from PyPI, in an environment of their own (`make clients`): each
runs a transcript against a real stack, and against a node whose answers call tools.

It is there for: a stream without [DONE], calls of tools without an id, and errors without a code.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compute_node.gateway.scripted_node import scripted_gateway
from tests.stack import ROOT, ServedStack

pytestmark = pytest.mark.system
PYTHON = ROOT / ".flashmoe/clients-venv/bin/python"
SCRIPTS = Path(__file__).parent / "real_clients"
needs_clients = pytest.mark.skipif(not PYTHON.exists(), reason="`make clients` was not run")


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with scripted_gateway(tmp_path_factory.mktemp("fm")) as url:
        yield url


@needs_clients
@pytest.mark.parametrize("name", ["openai", "anthropic", "litellm", "langchain"])
def test_a_transcript_of_each_client(name: str, stack: ServedStack, scripted: str) -> None:
    result = run([str(PYTHON), str(SCRIPTS / f"{name}_client.py"), stack.url, scripted])
    assert result.stdout.strip().endswith("passed"), result.stderr[-3000:]


@needs_clients
def test_llm_from_the_command_line(stack: ServedStack, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: tiny\n  model_name: tiny-chat\n  api_base: {stack.url}/v1\n"
    )
    command = [str(PYTHON.with_name("llm")), "-m", "tiny", "In the beginning"]
    options = ["-o", "temperature", "0", "-o", "max_tokens", "16"]
    streamed = run([*command, *options], LLM_USER_PATH=str(tmp_path))
    whole = run([*command, *options, "--no-stream"], LLM_USER_PATH=str(tmp_path))
    assert streamed.returncode == 0, streamed.stderr[-2000:]
    assert streamed.stdout.strip()
    assert streamed.stdout == whole.stdout


def run(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    """With no key of the user's, and no library that asks its home for news."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    environment = {**kept, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_API_KEY": "none", **more}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, cwd=SCRIPTS
    )
