"""`flashmoe replay` as a user meets it.

Planted faults seen red: a copy of the trace taken for training, lru left out when it is not named,
the policies of one cache size drawn for all.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploy.lab import plot, policy_replay
from deploy.lab.policy_replay import PolicyReplay, plotted_sizes
from deploy.verbs.replay import replay
from proto import errors
from scheduler.lab.policies import POLICIES, Background
from scheduler.simulate.replay import Outcome, ReplayCache, Setting
from scheduler.simulate.trace import TraceInvalid
from tests.scheduler.replays import PATH, recorded, trace_of
from tests.stack import flashmoe

SIMPLE = ("--policies", "decayed,lfu")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A trace of the same shape, of other generations."""
    trace = recorded()
    path = tmp_path / "other.npz"
    turned = trace_of(trace.topk_ids[::-1].tolist(), 32, trace.seq_offsets.tolist())
    turned.save(path)
    return path


def refused(*arguments: str) -> str:
    """The one sentence."""
    done = flashmoe("replay", *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("flashmoe: ") and done.stderr.strip().count("\n") == 0
    return done.stderr


def test_json_has_lru_and_min_whatever_is_asked() -> None:
    done = flashmoe("replay", str(PATH), "--slots", "12", "--warmup", "0", "--json", *SIMPLE)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["slots"] == 12 and document["scope"] == "layer"
    misses = {name: policy["misses"] for name, policy in document["policies"].items()}
    assert misses == {"lru": 1355, "lfu": 1515, "decayed": 1191, "min": 772}
    assert document["policies"]["decayed"]["gap_closed"] == pytest.approx(164 / 583)


def test_the_table_begins_with_the_best(other: Path) -> None:
    done = flashmoe(
        "replay", str(PATH), "--slots", "12", "--warmup", "0", "--scope", "pool",
        "--train", str(other), *SIMPLE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0].rstrip(",") for line in lines[3:]] == ["min", "decayed", "lru", "lfu"]
    assert "one pool" in done.stdout and "trained on other.npz" in done.stdout
    assert "1,244" in done.stdout and "577" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--slots", "12", "--policies", "lru,mru"), ("'mru'", "lru, lfu")),
        (("--slots", "12", "--scope", "model"), ("'model'", "layer or pool")),
        (("--slots", "3"), ("3 slots", "at least 4")),
        (("--slots", "32"), ("32", "give fewer")),
        (("--slots", "12"), ("360 steps", "--warmup")),
        (("--slots", "12", "--warmup", "-1"), ("-1", "0 or more")),
        (("--slots", "12", "--warmup", "0", "--lag", "2"), ("2 steps", "0 or 1")),
        (("--slots", "12", "--warmup", "0", "--half-life", "0"), ("0.0 tokens", "more than 0")),
        (("--slots", "12", "--warmup", "0", "--plot", "hits.txt"), ("hits.txt", ".png")),
        (("--slots", "12", "--predict", "--plot", "hits.png"), ("--plot", "--predict", "one")),
        (("--slots", "12", "--plot", "no/such/folder/hits.png"), ("no/such/folder", "make it")),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    sentence = refused(str(PATH), *arguments)
    for part in parts:
        assert part in sentence


def test_predictors_are_replayed_with_what_was_learned_before(
    other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red: --train is read by no one."""
    given = list[Background]()

    def make(setting: Setting, background: Background) -> ReplayCache:
        given.append(background)
        return POLICIES["lru"](setting, background)

    monkeypatch.setitem(POLICIES, "spy", make)
    whole, path = recorded(), tmp_path / "said.npz"
    said = np.zeros((*whole.topk_ids.shape[:2], 1, whole.num_experts), np.float16)
    replace(whole, said={"map": said}, truth=said[:, :, 0]).save(path)
    replay(path, 12, policies="spy", train=other, warmup=0, predict=True)
    assert given[0].train is not None and given[0].train.name == "other"


def test_a_missing_trace_is_one_sentence(tmp_path: Path) -> None:
    assert "no.npz" in refused(str(tmp_path / "no.npz"), "--slots", "12")


def test_never_trains_on_what_is_replayed(tmp_path: Path) -> None:
    copy, link = tmp_path / "copy.npz", tmp_path / "link.npz"
    shutil.copy(PATH, copy)
    link.symlink_to(PATH)
    resaved = tmp_path / "resaved.npz"
    recorded().take(np.arange(recorded().num_generations)[::-1], "resaved").save(resaved)
    for path in (PATH, copy, link, resaved):
        with pytest.raises(TraceInvalid, match="a trace of other generations"):
            policy_replay.training_trace(path, PATH, recorded())


def test_never_trains_on_another_model(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    trace_of([[[0, 1]]], 4).save(path)
    with pytest.raises(TraceInvalid, match="two traces of one model"):
        policy_replay.training_trace(path, PATH, recorded())


def test_says_when_some_generations_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = recorded()
    path = tmp_path / "some.npz"
    trace.take(np.array([0]), "some").save(path)
    assert policy_replay.training_trace(path, PATH, trace).num_generations == 1
    assert f"1 of {trace.num_generations} generations" in capsys.readouterr().err


def test_sizes_to_plot_can_all_be_replayed() -> None:
    trace = recorded()
    assert plotted_sizes(Setting(trace, 12, warmup_steps=0)) == [6, 9, 15, 18, 24]
    assert plotted_sizes(Setting(trace, 4, warmup_steps=0)) == [5, 6, 8]
    assert max(plotted_sizes(Setting(trace, 31, warmup_steps=0))) < 31


def test_a_policy_that_cannot_run_is_left_out_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def needs_more(setting: Setting, background: Background) -> ReplayCache:
        raise TraceInvalid("too few generations: record more prompts")

    monkeypatch.setitem(POLICIES, "picky", needs_more)
    setting = Setting(recorded(), 12, warmup_steps=0)
    given = PolicyReplay(["lru", "picky"], Background(), is_choice=False).run(setting)
    assert list(given) == ["lru"]
    assert "picky is left out: too few generations" in capsys.readouterr().err
    with pytest.raises(TraceInvalid):
        PolicyReplay(["lru", "picky"], Background()).run(setting)


def outcomes(lru: int, decayed: int, optimum: int) -> dict[str, Outcome]:
    counts = {"lru": lru, "decayed": decayed, "min": optimum}
    return {name: Outcome(1 - count / 1000, count, 1.0) for name, count in counts.items()}


def test_draws_every_policy_at_every_size(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    setting = Setting(recorded(), 12, warmup_steps=0)
    sizes = {18: outcomes(300, 250, 200), 12: outcomes(500, 450, 300), 6: outcomes(900, 850, 700)}
    figure = Figure()
    left, right = figure.subplots(1, 2)
    plot._draw_hits(left, setting, sizes)
    plot._draw_gaps(right, setting, sizes)
    hits = [line.get_xydata().tolist() for line in left.get_lines()]  # type: ignore[union-attr]
    assert [[6, 15.0], [12, 55.0], [18, 75.0]] in np.round(hits, 6).tolist()
    gaps = [line.get_xydata().tolist() for line in right.get_lines()]  # type: ignore[union-attr]
    assert [[6, 0.25], [12, 0.25], [18, 0.5]] in np.round(gaps, 6).tolist()
    assert {text.get_text() for text in right.texts} == {"LRU", "optimum", "decayed 0.25"}
    plot.draw(tmp_path / "hits.png", setting, sizes)
    assert (tmp_path / "hits.png").read_bytes().startswith(b"\x89PNG")


def test_a_size_at_which_lru_is_the_optimum_has_no_gap(tmp_path: Path) -> None:
    setting = Setting(recorded(), 12, warmup_steps=0)
    sizes = {12: outcomes(500, 500, 500), 18: outcomes(300, 250, 200)}
    assert plot._gap_curve(sizes, "decayed") == ([18], [0.5])
    sizes = {12: outcomes(500, 500, 500)}
    plot.draw(tmp_path / "hits.png", setting, sizes)


def test_labels_are_apart_and_near_their_own() -> None:
    apart = plot._apart({"a": 0.50, "b": 0.50, "c": 0.51, "d": 0.90})
    assert apart["d"] == 0.90
    placed = [apart[name] for name in "abc"]
    assert np.diff(placed) == pytest.approx([plot.LABEL_STEP] * 2)
    assert np.mean(placed) == pytest.approx(1.51 / 3)


def test_a_picture_that_cannot_be_written_is_known_before_the_replay(tmp_path: Path) -> None:
    plot.check_writable(tmp_path / "hits.svg")
    with pytest.raises(errors.InvalidRequest):
        plot.check_writable(tmp_path / "hits")
