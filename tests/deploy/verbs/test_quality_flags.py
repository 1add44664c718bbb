"""A quality budget from the command line to the node and back, on a real stack.

Planted fault seen red: the card beside the manifest not handed to the node.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.stack import ServedStack, flashmoe, served
from tests.tuned import ROUTE, tuned_copy


@pytest.fixture
def tuned(tiny_store: Path, tmp_path: Path) -> Path:
    return tuned_copy(tiny_store, tmp_path / "store")


def generate(stack: ServedStack, *flags: str) -> dict[str, Any]:
    arguments = ["--max-tokens", "40", "--ignore-eos", "--json", "--run-dir", str(stack.run.path)]
    done = flashmoe("generate", "In the beginning", *arguments, *flags)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.system
def test_one_request_is_lossy_and_another_exact(
    tiny_store: Path, tmp_path: Path, tuned: Path
) -> None:
    with served(tuned, tmp_path / "run", "--quality", "50%") as stack:
        lossy = generate(stack)
        exact = generate(stack, "--quality", "exact")
        narrow = generate(stack, "--quality", "0.1%")
    assert lossy["quality"] == "50%" and lossy["routes"][ROUTE] > 0 and lossy["skipped"] > 0
    assert exact["quality"] == "exact" and exact["skipped"] == 0 and ROUTE not in exact["routes"]
    assert narrow["quality"] == "0.1%" and narrow["skipped"] == 0, "it buys nothing"
    with served(tiny_store, tmp_path / "run") as stack:
        unasked = generate(stack)
    assert unasked["token_ids"] == exact["token_ids"] == narrow["token_ids"]
    assert unasked["quality"] == "exact" and unasked["skipped"] == 0


@pytest.mark.system
def test_a_budget_without_a_card_names_the_remedy(tiny_store: Path, tmp_path: Path) -> None:
    with served(tiny_store, tmp_path / "run") as stack:
        arguments = ["--quality", "1%", "--run-dir", str(stack.run.path)]
        done = flashmoe("generate", "In the beginning", *arguments)
    assert done.returncode == 2 and "flashmoe tune" in done.stderr
    for verb in (["serve"], ["run", "In the beginning"]):
        flags = ["--model", str(tiny_store), "--experts-memory", "37.5%", "--quality", "1%"]
        done = flashmoe(*verb, *flags)
        assert done.returncode == 2 and "starting" not in done.stderr
        assert f"run `flashmoe tune {tiny_store} --text FILES`" in done.stderr


@pytest.mark.system
def test_run_says_what_ran(tuned: Path) -> None:
    flags = ["--model", str(tuned), "--experts-memory", "37.5%"]
    flags += ["--max-tokens", "24", "--ignore-eos", "--quality", "50%"]
    done = flashmoe("run", "In the beginning", *flags)
    assert done.returncode == 0, done.stderr
    assert "was measured with 1 bytes for experts, this stack has" in done.stderr
    assert "budget 50%: " in done.stderr and ROUTE in done.stderr
