"""The forecaster in numpy says what the net in torch says; its file is checked; training learns.

Planted faults seen red: gates in another order, a state not reset for a new sequence, scaling not
folded into the head, a file of another model taken, an average that never moves.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from proto.errors import ForecasterInvalid
from scheduler.lab.calibration import calibrate
from scheduler.lab.calibration_settings import CalibrationSettings
from scheduler.lab.correction_net import CorrectionNet
from scheduler.lab.forecaster_net import Net, export
from scheduler.lab.lessons import Lessons
from scheduler.lab.policies import POLICIES, Background
from scheduler.learn.followers import Followers
from scheduler.learn.forecaster import Forecast, Forecaster
from scheduler.policy.learned import Learned
from scheduler.policy.lru import Lru
from scheduler.policy.river import RiverSettings
from scheduler.simulate.ranking import Ranks
from scheduler.simulate.replay import Setting, ranked, replay
from scheduler.simulate.trace import AccessTrace, TraceInvalid

SMALL = CalibrationSettings(
    width=24,
    hidden=4,
    max_updates=120,
    evaluate_every=40,
    window_steps=24,
    batch=4,
    correction_width=8,
    correction_updates=100,
)


def patterned_trace(seed: int, num_generations: int = 12, num_steps: int = 40) -> AccessTrace:
    """Every generation goes round one of four rings of experts, from a place of its own."""
    random = np.random.default_rng(seed)
    rings = np.random.default_rng(99).permuted(np.tile(np.arange(16), (4, 3, 1)), axis=2)
    steps = []
    for _ in range(num_generations):
        ring, start = rings[random.integers(4)], int(random.integers(16))
        places = (start + np.arange(num_steps))[:, None] * 2 + np.arange(2)
        steps.append(np.moveaxis(ring[:, places % 16], 0, 1))
    ids = np.concatenate(steps).astype(np.uint16)
    return AccessTrace(
        name=f"patterned{seed}",
        topk_ids=ids,
        seq_offsets=np.arange(num_generations + 1, dtype=np.int64) * num_steps,
        num_experts=16,
        topk_weights=np.full(ids.shape, 0.5, np.float16),
    )


@pytest.fixture(scope="module")
def forecaster() -> Forecaster:
    return calibrate(patterned_trace(0), SMALL, fingerprint="f00d")


def test_numpy_says_what_torch_says(tmp_path: Path) -> None:
    """Weights drawn at random, so that every term counts; two generations, one after the other."""
    trace = patterned_trace(1, num_generations=4)
    lessons = Lessons(trace, SMALL, tmp_path, lambda line: None)
    torch.manual_seed(1)
    net = Net(trace.shape, len(lessons.names), SMALL).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    correction = CorrectionNet(trace.shape, SMALL.correction_width).export()
    forecast = Forecast(export(net, correction, lessons, SMALL, "f00d"))
    for generation in range(2):
        start, end = (int(edge) for edge in trace.seq_offsets[generation : generation + 2])
        window = lessons.window([start], end - start)
        with torch.no_grad():
            logits = net(window.choices, window.features)
        by_step = logits.view(trace.num_layers, end - start, trace.num_experts, 2, -1)
        want = torch.sigmoid(by_step).mean(-1).permute(1, 3, 0, 2).numpy()  # [T, 2, L, E]
        for step in range(start, end):
            forecast.advance(str(generation), trace.topk_ids[step].astype(np.intp))
            rows = lessons.features[step].transpose(2, 0, 1)
            np.testing.assert_allclose(forecast.scores(rows), want[step - start], atol=2e-3)


def test_asking_changes_nothing_and_sequences_are_apart(forecaster: Forecaster) -> None:
    asked, silent = Forecast(forecaster), Forecast(forecaster)
    chosen = patterned_trace(0).topk_ids.astype(np.intp)
    features = np.zeros((len(forecaster.spec.feature_names), *forecaster.spec.shape))
    for step in range(3):
        asked.advance("a", chosen[step])
        asked.scores(features)
        asked.advance("b", chosen[step + 20])
        silent.advance("a", chosen[step])
    asked.advance("a", chosen[3])
    silent.advance("a", chosen[3])
    np.testing.assert_array_equal(asked.scores(features), silent.scores(features))


class Constant(Lru):
    """What an untrained net would say; on rings it is better than LRU."""

    def ranks(self) -> Ranks:
        return np.zeros(self.ages().shape)


def test_learns_what_the_trace_repeats(forecaster: Forecaster) -> None:
    """Rings of experts: the next are certain, but neither recent nor frequent."""
    trace = patterned_trace(2)
    setting = Setting(trace, slots=6, warmup_steps=40)
    got = {
        name: POLICIES[name](setting, Background())  # built anew: a cache is used up by a replay
        for name in ("lru", "decayed", "min")
    }
    misses = {name: replay(setting, cache).misses for name, cache in got.items()}
    settings = RiverSettings()
    features = settings.new_features(trace.shape, Followers(*trace.shape), forecaster.memory())
    learned = replay(setting, ranked(setting, Learned(forecaster, features), advised=True))
    untaught = ranked(setting, Constant(trace.shape))
    best_other = min(misses["lru"], misses["decayed"], replay(setting, untaught).misses)
    assert misses["min"] <= learned.misses < best_other - 0.2 * (best_other - misses["min"])


def test_the_same_seed_gives_the_same_forecaster(forecaster: Forecaster) -> None:
    again = calibrate(patterned_trace(0), SMALL, fingerprint="f00d")
    for name, weight in forecaster.weights.items():
        np.testing.assert_array_equal(weight, again.weights[name])


def test_too_few_generations_are_refused() -> None:
    with pytest.raises(TraceInvalid, match=r"record more prompts"):
        calibrate(patterned_trace(0, num_generations=3), SMALL)


def test_survives_the_disk(forecaster: Forecaster, tmp_path: Path) -> None:
    path = tmp_path / "forecaster.safetensors"
    forecaster.save(path)
    loaded = Forecaster.load(path)
    assert loaded.spec == forecaster.spec
    np.testing.assert_array_equal(loaded.remembered, forecaster.remembered)
    assert len(loaded.memory()) == forecaster.spec.trained_steps
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def _shorten(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors["head.output"] = tensors["head.output"][:, :-1].copy()


def _drop_weight(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    del tensors["gru.state"]


def _drop_memory(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    del tensors["remembered"]


def _not_finite(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors["embed.bias"][0] = np.nan


def _expert_too_many(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors["remembered"][0, 0, 0] = 999


def _another_format(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["format"] = "flashmoe-forecaster-0"


def _unknown_field(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["spec"] = json.dumps({**json.loads(metadata["spec"]), "extra": 1})


def _no_spec(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["spec"] = "[]"


@pytest.mark.parametrize(
    "damage",
    [
        _shorten,
        _drop_weight,
        _drop_memory,
        _not_finite,
        _expert_too_many,
        _another_format,
        _unknown_field,
        _no_spec,
    ],
)
def test_a_wrong_file_is_refused_with_the_remedy(
    forecaster: Forecaster, tmp_path: Path, damage: Callable[..., None]
) -> None:
    path = tmp_path / "forecaster.safetensors"
    forecaster.save(path)
    tensors = load_file(path)
    with safe_open(path, framework="numpy") as file:
        metadata = dict(file.metadata())
    damage(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(ForecasterInvalid, match="run `flashmoe calibrate` again"):
        Forecaster.load(path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"\xff" * 64])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "forecaster.safetensors"
    path.write_bytes(content)
    with pytest.raises(ForecasterInvalid, match="is damaged"):
        Forecaster.load(path)


def test_only_the_best_average_is_kept() -> None:
    """With no patience it stops at the first evaluation that is no better."""
    lines: list[str] = []
    settings = dataclasses.replace(SMALL, max_updates=400, evaluate_every=10, patience=1)
    calibrate(patterned_trace(0), settings, lines.append)
    losses = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("update")]
    assert 3 <= len(losses) <= 40
    assert losses[:-1] == sorted(losses[:-1], reverse=True)
    assert losses[-2] < 0.5 * np.log(2)  # of an untrained net


def test_a_lesson_does_not_recall_its_own_future(tmp_path: Path) -> None:
    """Each generation uses experts of its own, once each: nothing can be recalled."""
    ids = np.arange(4 * 8, dtype=np.uint16).reshape(-1, 1, 1)
    trace = AccessTrace(
        "apart", ids, np.arange(5, dtype=np.int64) * 8, 32, np.zeros(ids.shape, np.float16)
    )
    lessons = Lessons(trace, SMALL, tmp_path, lambda line: None)
    recalled = lessons.features[..., lessons.names.index("log_recalled_soon")]
    assert recalled.max() == recalled.min()
