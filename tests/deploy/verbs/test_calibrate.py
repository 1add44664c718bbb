"""`flashmoe calibrate` from a trace and from text, what it refuses, and who uses what it wrote.

Planted faults seen red: a trace of another model taken, a forecaster of another store used, the
launcher that does not look beside the manifest, texts that do not take turns.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compute_node.config import ROUTER_MAP_NAME
from compute_node.predict.router_map import RouterMap
from deploy.plan.parts import router_map_room
from deploy.settings import ServeSettings
from deploy.terminal.prompts import Prompt
from deploy.verbs.calibrate import PASSAGE_CHARACTERS, passages
from expert_store.manifest.manifest import Manifest
from proto import errors
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
    """Red: a stack of its own that loads the files that are to be replaced, and refuses them."""
    copy = tmp_path / "store"
    shutil.copytree(tiny_store, copy)
    for name in (FORECASTER_NAME, ROUTER_MAP_NAME):
        (copy / name).write_bytes(b"damaged, which calibrating again is the remedy for")
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 400)
    flags = ["--text", str(tmp_path), "--memory", "1GiB", "--experts-memory", "50%"]
    small = ["--generations", "4", "--max-tokens", "12", "--max-updates", "3"]
    done = flashmoe("calibrate", str(copy), *flags, *small)
    assert done.returncode == 0, done.stderr
    assert "trained on 44 steps of 4 generations" in done.stdout
    assert Forecaster.load(copy / FORECASTER_NAME).spec.trained_steps == 44
    assert "fewer than 64 steps" in done.stderr and not (copy / ROUTER_MAP_NAME).exists()


@pytest.fixture(scope="module")
def mapped(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model's, calibrated from texts: enough for a map of its routers."""
    folder = tmp_path_factory.mktemp("mapped")
    shutil.copytree(tiny_store, folder / "store")
    text = folder / "a.txt"
    text.write_text("In the beginning God created the heaven and the earth. And the earth " * 80)
    flags = ["--text", str(text), "--memory", "1GiB", "--experts-memory", "50%"]
    small = ["--generations", "6", "--max-tokens", "50", "--max-updates", "1"]
    done = flashmoe("calibrate", str(folder / "store"), *flags, *small)
    assert done.returncode == 0, done.stderr
    assert "1 ahead: next router" in done.stderr
    assert f"{ROUTER_MAP_NAME}: " in done.stderr
    assert {path.name for path in (folder / "store").iterdir()} == {
        "manifest.json",
        FORECASTER_NAME,
        ROUTER_MAP_NAME,
    }, "lessons are removed"
    return folder / "store"


@pytest.mark.system
def test_a_node_guesses_by_its_map_and_says_the_same_tokens(
    mapped: Path, tiny_store: Path, run_dir: Path, tmp_path: Path
) -> None:
    """Red when the launcher does not look beside the manifest."""
    flags = ["--experts-memory", "25%"]
    asked = {"max_tokens": 40, "temperature": 0.9, "seed": 3}
    with served(tiny_store, run_dir, *flags) as stack:
        expected = stack.generate("In the beginning", **asked)
        assert predictors(stack.status()) == {"next_router"}
    with served(mapped, tmp_path / "r", *flags) as stack:
        assert stack.generate("In the beginning", **asked) == expected
        assert predictors(stack.status()) == {"map", "next_router"}


def predictors(status: dict[str, Any]) -> set[str]:
    """Those that are asked; whether run-ahead saw anything is up to the time that reads took."""
    found = {one["predictor"] for one in status["compute_node"]["foresight"]}
    return found - {"run_ahead"}


def test_a_router_map_of_another_store_is_refused_at_start(
    mapped: Path, tmp_path: Path, run_dir: Path
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(mapped, copy)
    fingerprint = Manifest.load(mapped).spec.fingerprint
    ours = RouterMap.load(mapped / ROUTER_MAP_NAME, fingerprint, 32)
    halved = {
        layer: replace(part, down=part.down[:, : ours.hidden_size // 2])
        for layer, part in ours.parts.items()
    }
    flags = ["--run-dir", str(run_dir), "--experts-memory", "25%"]
    for other, why in (
        (replace(ours, fingerprint="another"), "was calibrated for another model or an earlier"),
        (replace(ours, hidden_size=ours.hidden_size // 2, parts=halved), "not of the model's"),
    ):
        other.save(copy / ROUTER_MAP_NAME)
        done = flashmoe("serve", "--model", str(copy), *flags)
        assert done.returncode != 0
        assert why in done.stderr and "run `flashmoe calibrate` again" in done.stderr


def test_a_router_map_may_lie_outside_the_store(mapped: Path, tmp_path: Path) -> None:
    """Beside the forecaster that is named; the memory plan has room for it."""
    settings = ServeSettings()
    assert settings.router_map(tmp_path) is None and router_map_room(None) == 0
    named = settings.with_forecaster(mapped / FORECASTER_NAME)
    found = named.router_map(tmp_path)
    assert found == mapped / ROUTER_MAP_NAME
    assert router_map_room(found) == 3 * found.stat().st_size
    gone = settings.model_copy(update={"compute_node": {"router_map_path": "/no/such"}})
    with pytest.raises(errors.ConfigInvalid, match="is no file"):
        gone.router_map(tmp_path)


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
