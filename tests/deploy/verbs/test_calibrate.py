"""`flashmoe calibrate` from a trace and from text, what it refuses, and who uses what it wrote.

Planted faults seen red: a trace of another model taken, a forecaster of another store used, the
launcher that does not look beside the manifest, texts that do not take turns.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploy.terminal.prompts import Prompt
from deploy.verbs.calibrate import PASSAGE_CHARACTERS, passages
from scheduler.config import FORECASTER_NAME
from scheduler.learn.forecaster import Forecaster
from scheduler.simulate.trace import AccessTrace
from tests.deploy.test_cli import assert_one_sentence
from tests.stack import flashmoe, served


@pytest.fixture(scope="module")
def store(tiny_store: Path, cut_trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model's, calibrated from the trace."""
    copy = tmp_path_factory.mktemp("calibrated") / "store"
    shutil.copytree(tiny_store, copy)
    done = flashmoe("calibrate", str(copy), "--trace", str(cut_trace), "--max-updates", "20")
    assert done.returncode == 0, done.stderr
    assert "trained on 360 steps of 6 generations" in done.stdout
    return copy


def test_writes_a_forecaster_of_this_store(store: Path, cut_trace: Path) -> None:
    forecaster = Forecaster.load(store / FORECASTER_NAME)
    assert forecaster.spec.fingerprint
    assert forecaster.spec.shape == AccessTrace.load(cut_trace).shape
    assert forecaster.spec.trained_steps == 360


@pytest.mark.system
def test_a_calibrated_stack_follows_it_and_says_the_same_tokens(
    store: Path, tiny_store: Path, run_dir: Path, tmp_path: Path
) -> None:
    flags = ["--experts-memory", "25%", "--policy"]
    asked = {"max_tokens": 40, "temperature": 0.9, "seed": 3}
    with served(tiny_store, run_dir, *flags, "lru") as stack:
        expected = stack.generate("In the beginning", **asked)
    with served(store, tmp_path / "r", *flags, "learned") as stack:
        assert stack.generate("In the beginning", **asked) == expected
        status = stack.status()
    assert status["compute_node"]["policy"] == "learned"
    assert status["compute_node"]["advice_used"] > 0
    assert "learned" in status["scheduler"]["nodes"]["node0"]["policies"]


@pytest.mark.system
def test_generates_from_text_with_a_stack_of_its_own(tiny_store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(tiny_store, copy)
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 400)
    flags = ["--text", str(tmp_path), "--memory", "1GiB", "--experts-memory", "50%"]
    small = ["--generations", "4", "--max-tokens", "12", "--max-updates", "3"]
    done = flashmoe("calibrate", str(copy), *flags, *small)
    assert done.returncode == 0, done.stderr
    assert "trained on 44 steps of 4 generations" in done.stdout
    assert (copy / FORECASTER_NAME).exists()


def test_a_forecaster_of_another_store_is_refused_at_start(
    store: Path, tmp_path: Path, run_dir: Path
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    forecaster = Forecaster.load(store / FORECASTER_NAME)
    other = replace(forecaster, spec=replace(forecaster.spec, fingerprint="another"))
    other.save(copy / FORECASTER_NAME)
    flags = ["--run-dir", str(run_dir), "--experts-memory", "25%"]
    done = flashmoe("serve", "--model", str(copy), *flags)
    assert done.returncode != 0
    assert "run `flashmoe calibrate` again" in done.stderr


def refused(store: Path, *flags: str) -> str:
    done = flashmoe("calibrate", str(store), *flags)
    assert done.returncode == 2
    assert_one_sentence(done.stderr)
    return done.stderr


def test_what_cannot_be_learned_from_is_refused(
    tiny_store: Path, cut_trace: Path, tmp_path: Path
) -> None:
    assert "either --text" in refused(tiny_store)
    assert "either --text" in refused(
        tiny_store, "--text", str(cut_trace), "--trace", str(cut_trace)
    )
    whole = AccessTrace.load(cut_trace)
    other, short = tmp_path / "other.npz", tmp_path / "short.npz"
    replace(whole, num_experts=64).save(other)
    whole.take(np.arange(2), "short").save(short)
    assert "record a trace of this model" in refused(tiny_store, "--trace", str(other))
    assert "record more prompts" in refused(tiny_store, "--trace", str(short))
    assert not (tiny_store / FORECASTER_NAME).exists()


def test_passages_take_turns_between_texts_and_lose_nothing() -> None:
    texts = [Prompt("long", "word " * 2000), Prompt("short", "other " * 200)]
    every = passages(texts, most=1000, seed=0)
    for text in texts:
        assert sum(len(p.text.split()) for p in every if p.name == text.name) == len(
            text.text.split()
        )
    few = passages(texts, most=4, seed=0)
    assert sorted(piece.name for piece in few) == ["long", "long", "short", "short"]
    assert all(len(piece.text) <= PASSAGE_CHARACTERS + 10 for piece in every)
    assert passages(texts, most=4, seed=1) != few
