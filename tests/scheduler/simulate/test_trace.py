"""An access trace survives the disk, and a file that is none is refused with a reason.

Planted faults seen red: weights not saved, an expert number at num_experts let through, offsets
that stand still let through, an expert named twice let through, names not checked against the
generations.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.simulate.trace import AccessTrace, TraceInvalid, check_same_model
from tests.scheduler.replays import recorded, trace_of, traces

FINE: dict[str, Any] = {
    "topk_ids": np.array([[[0, 1]], [[2, 3]], [[1, 3]]], np.uint8),
    "seq_offsets": np.array([0, 1, 3]),
    "num_experts": np.int64(4),
    "topk_weights": np.full((3, 1, 2), 0.5, np.float16),
    "seq_names": np.array(["first", "second"]),
}


def write(path: Path, **arrays: Any) -> Path:
    with path.open("wb") as file:
        np.savez(file, **arrays)
    return path


def assert_equal(one: AccessTrace, other: AccessTrace) -> None:
    np.testing.assert_array_equal(one.topk_ids, other.topk_ids)
    np.testing.assert_array_equal(one.topk_weights, other.topk_weights)
    np.testing.assert_array_equal(one.seq_offsets, other.seq_offsets)
    assert (one.num_experts, one.sampling) == (other.num_experts, other.sampling)


@settings(deadline=None)
@given(trace=traces(), extra=st.sampled_from([0, 1, 250, 300]), seed=st.integers(0, 9))
def test_survives_the_disk(
    tmp_path_factory: pytest.TempPathFactory, trace: AccessTrace, extra: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    shape = (*trace.topk_ids.shape[:2], trace.num_experts + extra)
    given_trace = AccessTrace(
        name="trace",
        topk_ids=trace.topk_ids,
        seq_offsets=trace.seq_offsets,
        num_experts=trace.num_experts + extra,
        topk_weights=random.random(trace.topk_ids.shape).astype(np.float16),
        seq_names=("a name, with a comma",),
        router_scores=random.random(shape).astype(np.float16) if seed % 2 else None,
        sampling="temperature 0.8",
        said={"map": random.random((*shape[:2], 2, shape[2])).astype(np.float16)},
        truth=random.random(shape).astype(np.float16) if seed % 3 else None,
    )
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    given_trace.save(path)
    loaded = AccessTrace.load(path, predictions=True)
    assert_equal(loaded, given_trace)
    assert (loaded.name, loaded.seq_names) == ("trace", given_trace.seq_names)
    if given_trace.router_scores is None:
        assert loaded.router_scores is None
    else:
        np.testing.assert_array_equal(loaded.router_scores, given_trace.router_scores)
    assert loaded.said.keys() == {"map"}
    np.testing.assert_array_equal(loaded.said["map"], given_trace.said["map"])
    assert (loaded.truth is None) == (given_trace.truth is None)
    if loaded.truth is not None:
        np.testing.assert_array_equal(loaded.truth, given_trace.truth)


def test_what_predictors_said_is_read_where_it_is_asked_for(tmp_path: Path) -> None:
    """Red when a replay of policies loads it, too: what is malformed there is no matter to it."""
    path = write(tmp_path / "t.npz", **FINE, said_map=np.zeros(3), truth=np.zeros(3))
    plain = AccessTrace.load(path)
    assert plain.said == {} and plain.truth is None
    with pytest.raises(TraceInvalid, match="said_map must be"):
        AccessTrace.load(path, predictions=True)


@pytest.mark.parametrize("gives", ["logits", "probabilities"])
def test_gates_are_shares_of_what_a_router_gave(gives: str) -> None:
    """Red when probabilities go through a softmax once more."""
    logits = np.log([[[0.5, 0.25, 0.125, 0.125]], [[0.1, 0.2, 0.3, 0.4]]]) + 3.0
    shares = np.exp(logits - 3.0)
    scores = (logits if gives == "logits" else shares).astype(np.float16)
    trace = AccessTrace("t", FINE["topk_ids"][:2], np.array([0, 2]), 4, scores, (), scores)
    assert trace.gates is not None
    np.testing.assert_allclose(trace.gates, shares, atol=2e-3)
    events = list(trace.events())
    assert events[1].gates is not None and (events[1].gates == trace.gates[1]).all()


def test_what_is_optional_may_be_missing(tmp_path: Path) -> None:
    required = {name: FINE[name] for name in ("topk_ids", "seq_offsets", "num_experts")}
    trace = AccessTrace.load(write(tmp_path / "bare.npz", **required))
    assert trace.seq_names == () and trace.router_scores is None
    assert trace.said == {} and trace.truth is None
    assert trace.topk_weights.shape == (3, 1, 2) and not trace.topk_weights.any()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("topk_ids", None, "has no topk_ids"),
        ("seq_offsets", None, "has no seq_offsets"),
        ("num_experts", None, "has no num_experts"),
        ("topk_ids", FINE["topk_ids"][0], "must be integers"),
        ("topk_ids", FINE["topk_ids"].astype(np.float32), "must be integers"),
        ("topk_ids", FINE["topk_ids"][:0], "must be integers"),
        ("topk_ids", FINE["topk_ids"] + np.uint8(1), "names expert 4 of 4"),
        ("topk_ids", FINE["topk_ids"].astype(np.int64) - 1, "names expert"),
        ("topk_ids", np.array([[[0, 1]], [[2, 2]], [[1, 3]]]), "twice"),
        ("num_experts", np.array([4]), "must be one number"),
        ("num_experts", np.float64(4), "must be one number"),
        ("num_experts", np.int64(0), "from 1 to 65536"),
        ("num_experts", np.int64(65_537), "from 1 to 65536"),
        ("seq_offsets", np.array([1, 3]), "must rise from 0"),
        ("seq_offsets", np.array([0, 2]), "must rise from 0 to the 3"),
        ("seq_offsets", np.array([0, 1, 1, 3]), "must rise"),
        ("seq_offsets", np.array([0, 2, 1, 3]), "must rise"),
        ("seq_offsets", np.array([0]), "must rise"),
        ("seq_offsets", np.array([0.0, 3.0]), "must rise"),
        ("seq_offsets", np.array([[0, 3]]), "must rise"),
        ("topk_weights", FINE["topk_weights"][:2], "finite floats"),
        ("topk_weights", FINE["topk_ids"], "finite floats"),
        ("topk_weights", np.full((3, 1, 2), np.nan, np.float16), "finite floats"),
        ("seq_names", np.array(["one name"]), "must name each of the 2"),
        ("router_scores", np.zeros((3, 1, 3), np.float16), "router_scores must be floats"),
        ("router_scores", np.zeros((3, 1, 4), np.int64), "router_scores must be floats"),
        ("router_scores", np.full((3, 1, 4), np.nan, np.float16), "router_scores must be finite"),
        ("truth", np.zeros((3, 1, 3), np.float16), "truth must be floats"),
        ("said_map", np.zeros((3, 1, 4), np.float16), "said_map must be"),
        ("said_map", np.zeros((3, 1, 2, 3), np.float16), "said_map must be"),
        ("said_map", np.zeros((3, 1, 2, 4), np.int64), "said_map must be"),
        ("topk_ids", np.array([[[None, 1]]], object), "no pickle"),
    ],
)
def test_a_malformed_array_is_refused(tmp_path: Path, name: str, value: Any, reason: str) -> None:
    AccessTrace.load(write(tmp_path / "fine.npz", **FINE))
    arrays = {key: array for key, array in {**FINE, name: value}.items() if array is not None}
    path = write(tmp_path / "malformed.npz", **arrays)
    with pytest.raises(TraceInvalid, match=reason) as raised:
        AccessTrace.load(path, predictions=True)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    one_array = io.BytesIO()
    np.save(one_array, FINE["topk_ids"])
    fine = write(tmp_path / "fine.npz", **FINE).read_bytes()
    for content in (b"", b"text", one_array.getvalue(), fine[: len(fine) // 2]):
        path = tmp_path / "broken.npz"
        path.write_bytes(content)
        with pytest.raises(TraceInvalid, match=r"broken\.npz"):
            AccessTrace.load(path)


def test_events_count_steps_of_their_generation() -> None:
    trace = trace_of([[[0, 1]], [[2, 3]], [[1, 3]]], 4, seq_offsets=[0, 1, 3])
    events = list(trace.events())
    assert [(event.sequence, event.step) for event in events] == [("0", 0), ("1", 0), ("1", 1)]
    assert [event.topk_ids.tolist() for event in events] == trace.topk_ids.tolist()


def test_takes_generations_in_the_order_given() -> None:
    trace = trace_of([[[0]], [[1]], [[2]], [[3]]], 5, seq_offsets=[0, 1, 3, 4])
    taken = trace.take(np.array([2, 1]), "taken")
    assert taken.topk_ids.ravel().tolist() == [3, 1, 2]
    assert taken.seq_offsets.tolist() == [0, 1, 3]


def test_used_says_which_experts_a_step_chose() -> None:
    trace = recorded()
    used = trace.used()
    assert used.shape == (360, 8, 32) and (used.sum(axis=2) == 4).all()
    assert used[7, 3, trace.topk_ids[7, 3]].all()


@pytest.mark.parametrize("other", [trace_of([[[0]]], 3), trace_of([[[0], [1]]], 4)])
def test_traces_of_two_models_are_told_apart(other: AccessTrace) -> None:
    trace = trace_of([[[0]]], 4)
    check_same_model(trace, trace)
    with pytest.raises(TraceInvalid, match="two traces of one model"):
        check_same_model(trace, other)
