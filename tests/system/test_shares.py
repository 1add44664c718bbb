"""Workers whose stores have only a share of the experts: the tokens of one box, and each computes
experts that it has, and says which.

Written against: a worker asked for what it does not have, one that is not asked for what it
has, a probe of an expert that the share lacks.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from expert_store.manifest.manifest import Manifest
from expert_store.manifest.share import Share
from expert_store.offline.shard import shard
from proto import errors, rpc
from proto import stats_pb2 as stats_pb
from proto.stats import Stats
from proto.worker_pb2_grpc import WorkerStub
from tests.stack import wait_for
from tests.system.test_boxes import PROMPT, alone, cluster, worker

pytestmark = pytest.mark.system
__all__ = ["alone"]


def worker_stats(address: str) -> Stats:
    with rpc.connect(address) as channel:
        return Stats.from_pb(WorkerStub(channel).Stats(stats_pb.StatsRequest(), timeout=10))


def shares(store: Path, folder: Path, owners: int, copies: int = 1) -> list[Path]:
    for owner in range(1, owners + 1):
        shard(store, Share(owner, owners, copies), folder / str(owner))
    return [folder / str(owner) for owner in range(1, owners + 1)]


def test_two_halves_compute_what_they_have(
    alone: dict[str, list[int]], tiny_store: Path, run_dir: Path, tmp_path: Path
) -> None:
    stores = shares(tiny_store, tmp_path, 2)
    with cluster(tiny_store, run_dir, 2, stores) as boxes:
        boxes.check_all_compute(alone)
        held = [Manifest.load(store).num_experts for store in stores]
        assert boxes.figure("experts_held") == held and boxes.figure("slots") == [64, 64]
        for number, one in enumerate(boxes.workers):
            said = worker_stats(one.address)
            assert (said.experts_held, said.experts_total, said.slots) == (held[number], 256, 64)
            assert said.share == f"share {number + 1} of 2" and 0 < said.resident <= 64


def test_with_two_copies_a_box_may_fail(
    alone: dict[str, list[int]], tiny_store: Path, run_dir: Path, tmp_path: Path
) -> None:
    with cluster(tiny_store, run_dir, 3, shares(tiny_store, tmp_path, 3, 2)) as boxes:
        assert boxes.tokens_killing(1) == alone[PROMPT]
        before = boxes.figure("answered")
        assert boxes.tokens() == alone[PROMPT]
        after = boxes.figure("answered")
        assert after[0] > before[0] and after[2] > before[2] and after[1] == before[1]


def test_the_main_node_may_have_a_share_itself(
    alone: dict[str, list[int]], tiny_store: Path, run_dir: Path, tmp_path: Path
) -> None:
    """Written against: a request that waits past the deadline."""
    own, *others = shares(tiny_store, tmp_path, 3)
    with cluster(own, run_dir, 2, others, deadline_s=3.0) as boxes:
        for prompt, expected in alone.items():
            assert boxes.tokens(prompt) == expected
        boxes.workers[0].stop(signal.SIGKILL)
        with pytest.raises(errors.Unavailable, match=r"expert L\d\dE\d\d\d is neither in the main"):
            boxes.tokens()
        with worker(boxes.folders[0], 64):
            wait_for(lambda: boxes.figure("up")[0] == 1, 30, "the worker to join again")
            assert boxes.tokens() == alone[PROMPT]
