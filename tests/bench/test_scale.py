"""The store that is made is one, and what the bench counts is what the product does: at a tiny
geometry, on the recording of the shipped model.

Planted faults seen red: routers not overruled, layers in reverse; gate weights mixed up or experts
in descending order where no cache is; a node that adds outputs as they come; the same codes for all
experts, codes that no seed fixes, the checksum of another place, a journal left, no look at the
disk; a warm-up that hears no advice, whose books are forgotten, or that leaves nothing resident;
advice of the present step; a segment used twice, one not cut; a trace without gate weights taken;
no comparison with the run without a cache, none between policies, miscounts passed over.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compute_node.engine.usage import Usage
from expert_store.manifest.manifest import Manifest
from expert_store.offline.verify import verify
from scheduler.simulate.trace import AccessTrace, TraceInvalid
from tests.bench.scale import random_store
from tests.bench.scale.advice import told_by
from tests.bench.scale.node import Node, Run
from tests.bench.scale.report import Cell, Results, differing_steps, miscounted_steps
from tests.bench.scale.segments import Segment, ranking, replayed_hits, segments
from tests.local_store import local_store
from tests.scheduler.replays import recorded

TINY = {
    "num_hidden_layers": 8,
    "num_local_experts": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
SLOTS, SPARE = 101, 2  # no multiple of the layers
WARMUP, COUNTED = 60, 6


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store_dir = tmp_path_factory.mktemp("scale") / "store"
    random_store.make(store_dir, TINY)
    return store_dir


@pytest.fixture(scope="module")
def node(store: Path) -> Node:
    return Node(store, Manifest.load(store))


@pytest.fixture(scope="module")
def segment() -> Segment:
    """The recording has no gate weights."""
    trace = recorded()
    weights = np.random.default_rng(0).dirichlet([1] * trace.top_k, trace.topk_ids.shape[:2])
    weighted = replace(trace, topk_weights=weights.astype(np.float16))
    return segments(weighted, 1, WARMUP, COUNTED)[0]


@pytest.fixture
def served(store: Path, run_dir: Path) -> Iterator[Path]:
    with local_store(store, run_dir, SLOTS + SPARE, spare_slots=SPARE):
        yield run_dir


def test_the_store_is_whole(store: Path) -> None:
    """What `flashmoe verify` asks; and nothing but the store is left in the folder."""
    assert verify(store) == []
    spec = Manifest.load(store).spec
    assert (len(spec.moe_layers), spec.num_experts, spec.top_k) == (8, 32, 4)
    assert (spec.weight_format.name, spec.weight_format.group) == ("int4", 64)
    left = {path.name for path in store.iterdir()}
    assert left == {"config.json", "manifest.json", "experts.bin", "dense.bin"}


def test_experts_differ_and_are_the_same_when_made_again(store: Path, tmp_path: Path) -> None:
    checksums = [record.checksum for record in Manifest.load(store).records.values()]
    assert len(set(checksums)) == len(checksums)
    again = random_store.make(tmp_path / "again", TINY)
    assert again.spec.fingerprint == Manifest.load(store).spec.fingerprint


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=random_store.POOL_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(random_store.NoRoom, match="has 67,108,864 free"):
        random_store.make(tmp_path / "store", TINY)
    assert not (tmp_path / "store" / "experts.bin").exists()


def test_a_run_hits_what_the_scheduler_replays_and_computes_what_no_cache_does(
    node: Node, segment: Segment, served: Path
) -> None:
    """Of local policies and of one that is told; misses are read, hits are not."""
    told = told_by(segment.trace, None)
    fresh = node.fresh(segment, COUNTED)
    assert len(set(fresh)) == COUNTED
    for name in ("lru", "lfu", "lfru", "decayed", "river"):
        run = node.run(segment, name, told.get(name), SLOTS, served, os.getpid())
        hits = [step.hits for step in run.steps]
        assert hits == replayed_hits(*ranking(name, segment, told), segment, SLOTS), name
        assert run.digests == fresh, name
        misses = sum(step.misses for step in run.steps)
        assert misses == 8 * 4 * COUNTED - sum(hits)
        expert_bytes = node.spec.expert_bytes(0)
        assert 0 < sum(step.bytes_read for step in run.steps) <= misses * expert_bytes


def test_the_routers_choice_is_the_recordings(node: Node, segment: Segment, served: Path) -> None:
    node.run(segment, "lru", None, SLOTS, served, os.getpid())
    layers = [access.ids[0].tolist() for _, access in sorted(node.step.accesses.items())]
    assert layers == segment.trace.topk_ids[-1].tolist()


def test_segments_are_of_different_generations_and_as_long_as_asked() -> None:
    ids = np.arange(40, dtype=np.uint16).reshape(40, 1, 1)
    weights = np.ones((40, 1, 1), np.float16)
    trace = AccessTrace("t", ids, np.array([0, 10, 20, 30, 40]), 40, weights)
    found = segments(trace, 2, 8, 4)
    assert [one.trace.topk_ids.ravel().tolist() for one in found] == [
        list(range(12)),
        list(range(20, 32)),
    ]
    assert [one.trace.seq_offsets.tolist() for one in found] == [[0, 10, 12], [0, 10, 12]]
    with pytest.raises(TraceInvalid, match="ask for fewer"):
        segments(trace, 3, 8, 4)


def test_a_trace_without_gate_weights_is_refused() -> None:
    """Experts would weigh nothing, and any bits would do."""
    with pytest.raises(TraceInvalid, match="no gate weights"):
        segments(recorded(), 1, WARMUP, COUNTED)


def test_other_bits_and_other_hits_are_seen() -> None:
    """Between two policies, beside a run without a cache, and beside a replay."""
    one, other = Cell("1GiB", "lru", 0), Cell("1GiB", "lfru", 0)
    steps = [Usage(hits=3), Usage(hits=4)]
    results = Results(
        runs={one: Run(steps, [1, 2]), other: Run(steps, [1, 2])},
        replayed={one: [3, 4], other: [3, 4]},
        fresh=[1],
    )
    assert (differing_steps(results), miscounted_steps(results)) == (0, 0)
    results.runs[other].digests[1] = 7
    results.replayed[one][0] = 2
    assert (differing_steps(results), miscounted_steps(results)) == (1, 1)
    results.fresh[0] = 9
    assert differing_steps(results) == 3
