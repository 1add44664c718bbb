"""A real stack under every policy: the same tokens, and who is in charge is told.

Planted faults seen red: node or scheduler not told the policy; the node's own figures left out of
the status.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expert_store.manifest.manifest import Manifest
from scheduler.config import FORECASTER_NAME
from scheduler.lab.calibration import calibrate
from scheduler.lab.calibration_settings import CalibrationSettings
from tests.scheduler.replays import recorded
from tests.stack import ServedStack, flashmoe, served, wait_for

pytestmark = pytest.mark.system

LOCAL = ("lru", "lfru", "decayed", "importance")
SHADOWS = {"decayed", "lru", "lfru", "river", "learned", "min", "actual"}
NUM_TOKENS = 48
PROMPT = "In the beginning"


def generate(stack: ServedStack) -> list[int]:
    return stack.generate(PROMPT, max_tokens=NUM_TOKENS, temperature=0.9, seed=5)


def shadows_of(stack: ServedStack, steps: int) -> dict[str, Any]:
    """What the scheduler tells of the node, once it has heard of so many decode steps."""

    def found() -> dict[str, Any] | None:
        nodes = stack.status()["scheduler"].get("nodes", {})
        shadows: dict[str, Any] | None = nodes.get("node0")
        return shadows if shadows and shadows["steps"] >= steps else None

    shadows = wait_for(found, 60, f"{steps} steps to reach the scheduler")
    assert isinstance(shadows, dict)
    return shadows


@pytest.fixture(scope="module")
def calibrated_store(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a forecaster beside the manifest that has learned next to nothing."""
    store_dir = tmp_path_factory.mktemp("calibrated") / "tiny-moe"
    shutil.copytree(tiny_store, store_dir)
    trace = replace(recorded(), seq_offsets=np.arange(0, 361, 60), seq_names=())
    settings = CalibrationSettings(width=16, window_steps=32, max_updates=10)
    fingerprint = Manifest.load(store_dir).spec.fingerprint
    calibrate(trace, settings, fingerprint=fingerprint).save(store_dir / FORECASTER_NAME)
    return store_dir


@pytest.fixture(scope="module")
def expected(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """What the shipped model says when every expert is resident and nothing is ever evicted."""
    run_dir = tmp_path_factory.mktemp("all")
    with served(tiny_store, run_dir / "r", "--experts-memory", "100%") as stack:
        return generate(stack)


@pytest.mark.parametrize("policy", [*LOCAL, "river", "learned", "auto"])
def test_the_same_tokens_under_every_policy(
    policy: str, expected: list[int], calibrated_store: Path, run_dir: Path
) -> None:
    with served(calibrated_store, run_dir, "--policy", policy, "--experts-memory", "25%") as stack:
        assert generate(stack) == expected
        shadows = shadows_of(stack, NUM_TOKENS - 1)
        assert generate(stack) == expected
        node = stack.status()["compute_node"]
        asked_for = {"importance"} if policy == "importance" else set()
        assert set(shadows["policies"]) == SHADOWS | asked_for
        scores = shadows["policies"]
        assert scores["min"]["hit_ratio"] >= max(score["hit_ratio"] for score in scores.values())
        assert 0 < scores["actual"]["hit_ratio"] < 1
        if policy == "auto":
            assert shadows["in_charge"] in SHADOWS - {"min", "actual"}
        else:
            assert (shadows["in_charge"], shadows["why"]) == (policy, "configured")
        if policy in LOCAL:
            assert (node["policy"], node["advice_used"]) == (policy, 0)
        else:
            assert node["advice_used"] > 0
        if policy in ("river", "learned"):
            assert node["policy"] == policy


def test_auto_may_choose_importance_when_that_is_asked_for(
    tiny_store: Path, expected: list[int], run_dir: Path, tmp_path: Path
) -> None:
    """Red when the launcher tells the node alone: no shadow follows it."""
    config = tmp_path / "flashmoe.toml"
    config.write_text("[compute_node]\nimportance = true\n")
    with served(tiny_store, run_dir, "--config", str(config), "--experts-memory", "25%") as stack:
        assert generate(stack) == expected
        shadows = shadows_of(stack, NUM_TOKENS - 1)
    assert 0 < shadows["policies"]["importance"]["hit_ratio"] < 1


def test_status_shows_who_is_in_charge(calibrated_store: Path, run_dir: Path) -> None:
    with served(calibrated_store, run_dir, "--policy", "lfru") as stack:
        generate(stack)
        shadows_of(stack, NUM_TOKENS - 1)
        lines = flashmoe("status", "--run-dir", str(run_dir)).stdout.splitlines()
    table = lines[next(n for n, line in enumerate(lines) if "policies of node0" in line) :]
    assert any("in charge" in line and "lfru: configured" in line for line in table)
    for name in SHADOWS - {"actual"}:
        assert any(line.startswith(name) and "hits lately" in line for line in table), name
    assert any(line.startswith("this node") and "hits lately" in line for line in table)


def test_what_was_not_calibrated_is_refused_with_the_remedy(
    tiny_store: Path, run_dir: Path
) -> None:
    flags = ["--model", str(tiny_store), "--run-dir", str(run_dir), "--policy", "learned"]
    done = flashmoe("serve", *flags, "--experts-memory", "25%")
    assert done.returncode != 0
    assert "flashmoe calibrate" in done.stderr
