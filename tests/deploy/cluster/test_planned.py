"""What a plan says of the boxes of cluster.toml is what their daemons will do.

Planted faults seen red: see the tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tomli_w

from compute_node import other_boxes
from compute_node.config import ComputeNodeConfig
from deploy.cli import run
from deploy.cluster.config import ClusterConfig
from deploy.cluster.plan_page import ranges
from deploy.cluster.planned import PlannedCluster
from deploy.terminal import console
from expert_store.manifest.manifest import Manifest
from expert_store.manifest.share import Share
from expert_store.offline.pack import pack
from expert_store.offline.shard import shard
from proto import errors
from proto.held_experts import HeldExperts
from tests.stack import MODEL

MAIN = {"host": "127.0.0.2", "memory": "1400MiB", "experts_memory": "25%"}
W1 = {"name": "w1", "host": "127.0.0.3", "memory": "1GiB", "experts_memory": "50%"}
W2 = {"name": "w2", "host": "127.0.0.4", "memory": "1GiB", "joules": 2.0}
ROTATION = {"tables": {"compute_node": {"placement": "rotation"}}}


@pytest.fixture
def planned(tiny_store: Path, tmp_path: Path) -> Callable[..., PlannedCluster]:
    def call(*workers: dict[str, Any], **more: Any) -> PlannedCluster:
        config = ClusterConfig.load(written(tiny_store, tmp_path, *workers, **more))
        return PlannedCluster.of(config, tiny_store, Manifest.load(tiny_store))

    return call


def written(store: Path, folder: Path, *workers: dict[str, Any], **more: Any) -> Path:
    path = folder / "cluster.toml"
    document = {"model": str(store), "main": MAIN, "worker": list(workers), **more}
    path.write_text(tomli_w.dumps(document))
    return path


def test_a_box_that_borrows_is_planned_without_a_store(
    planned: Callable[..., PlannedCluster],
) -> None:
    """Planted fault seen red: the memory of a store of its own."""
    main, lent, borrower = planned(W1, W2 | {"store": "w1"}).boxes
    assert borrower.store == "none: all experts of w1"
    assert {"expert_store", "spare_slots"}.isdisjoint(borrower.memory.parts)
    assert "lent_slots" in lent.memory.parts and "lent_slots" not in main.memory.parts


@pytest.mark.parametrize("main", [MAIN, MAIN | ROTATION], ids=["shares", "rotation"])
def test_the_map_is_what_the_main_node_goes_by(
    main: dict[str, Any], planned: Callable[..., PlannedCluster], tiny_store: Path
) -> None:
    """Seen red: the cost of a box left out, its share left out, all that it has for its slots."""
    found = planned(W1, W2 | {"share": "1/2"}, main=main)
    spec = Manifest.load(tiny_store).spec
    config = ComputeNodeConfig(
        address="unix:n",
        store_address="unix:s",
        session_dir=Path("s"),
        slots=64,
        workers=("w1", "w2"),
        **main.get("tables", {}).get("compute_node", {}),
    )
    description = SimpleNamespace(spec=spec, held=HeldExperts())
    cache = SimpleNamespace(capacity=SimpleNamespace(slots=64))
    boxes = other_boxes.new_boxes(config, cast(Any, description), cast(Any, cache))
    assert boxes is not None
    half = HeldExperts(Share(1, 2).experts(spec))
    links = [Link("w1", 128, 1.0, HeldExperts()), Link("w2", len(half.keys or ()), 2.0, half)]
    boxes.links = cast(Any, links)
    for place, layer in enumerate(spec.moe_layers):
        given = boxes.shares(layer, range(spec.num_experts))
        counts = [len(given.get(cast(Any, one), ())) for one in links]
        rest = spec.num_experts - sum(counts)
        assert [one.by_layer[place] for one in found.map.boxes] == [rest, *counts]
    assert [one.slots for one in found.boxes] == [64, 128, len(half.keys or ())]


class Link(SimpleNamespace):
    __hash__ = object.__hash__

    def __init__(self, address: str, slots: int, cost: float, held: HeldExperts) -> None:
        super().__init__(address=address, slots=slots, cost=cost, held=held, is_up=True)


def test_a_share_that_is_here_is_read_and_one_that_is_not_is_said(
    planned: Callable[..., PlannedCluster], tiny_store: Path, tmp_path: Path
) -> None:
    """Seen red: a store that is here not looked at."""
    shard(tiny_store, Share(2, 3), tmp_path / "third")
    here = planned(W1, W2 | {"model": "third"})
    said = planned(W1, W2 | {"share": "2/3", "model": "/elsewhere"})
    assert [one.store for one in here.boxes] == ["all experts", "all experts", "share 2 of 3"]
    assert here.map == said.map
    elsewhere = planned(W1, W2 | {"model": "/elsewhere"})
    assert elsewhere.boxes[2].store == "all experts, supposed: it is not here"


def test_what_cannot_be_planned_is_refused_by_box(
    planned: Callable[..., PlannedCluster], tiny_store: Path, tmp_path: Path
) -> None:
    with pytest.raises(errors.MemoryExceeded, match=r"^box w1: .* the smallest that works is"):
        planned({"name": "w1", "host": "127.0.0.3", "memory": "500MiB"})
    pack(MODEL, tmp_path / "int8", weight_format="int8")
    with pytest.raises(errors.ManifestInvalid, match=r"box w1: .* of another model"):
        planned(W1 | {"model": "int8"})
    with pytest.raises(errors.ConfigInvalid, match="share '3/2' names no share"):
        planned(W1 | {"share": "3/2"})
    with pytest.raises(errors.InvalidRequest, match="no placement 'turns'"):
        planned(W1, main=MAIN | {"tables": {"compute_node": {"placement": "turns"}}})
    shard(tiny_store, Share(1, 2), tmp_path / "half")
    config = ClusterConfig.load(written(tiny_store, tmp_path, W1 | {"share": "2/2"}))
    with pytest.raises(errors.ManifestInvalid, match="is share 1 of 2, box w1 has share 2 of 2"):
        PlannedCluster.of(config, tmp_path / "half", Manifest.load(tmp_path / "half"))


def test_memory_of_another_box_is_not_this_machines(planned: Callable[..., PlannedCluster]) -> None:
    """Seen red: a box with more memory than the machine that plans is refused."""
    assert planned(W1 | {"memory": "64TiB"}).boxes[1].memory.ceiling_bytes > 1 << 45


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def call(*arguments: str, code: int = 0) -> Any:
        assert run(["plan", *arguments]) == code
        return capsys.readouterr()

    return call


def test_a_person_and_a_program_are_shown_the_map(
    shown: Callable[..., Any], tiny_store: Path, tmp_path: Path
) -> None:
    shadow = {"host": "127.0.0.5", "memory": "1GiB", "model": str(tiny_store)}
    file = written(tiny_store, tmp_path, W1, W2 | {"share": "1/2"}, shadow=shadow)
    target = (str(tiny_store), "--cluster", str(file))
    said = shown(*target).out
    rows = [" ".join(line.split()) for line in said.splitlines()]
    assert rows[0].startswith("Who owns which experts, by shares"), said
    assert "w1 all experts 736.0 MiB 128 143 17 to 18 128 0" in rows, said
    assert "shadow all experts in exact 736.0 MiB 256 - - - -" in rows, said
    assert "0-6 8 18 6" in rows and "7 8 17 7" in rows, said
    found = json.loads(shown(*target, "--json").out)
    assert [one["experts"] for one in found["boxes"]] == [64, 143, 49]
    assert found["boxes"][2]["by_layer"] == [6] * 7 + [7] and found["boxes"][2]["doubled"] == 80
    assert found["shadow"]["slots"] == 256 and "rotation" not in found


def test_a_rotation_says_how_many_workers_are_enough(
    shown: Callable[..., Any], tiny_store: Path, tmp_path: Path
) -> None:
    file = written(tiny_store, tmp_path, W1, W2, main=MAIN | ROTATION)
    target = (str(tiny_store), "--cluster", str(file))
    assert "2 groups in turn, each worker with a disk and processor as" in shown(*target).out
    fast = (*target, "--worker-disk", "100000")
    assert "no disk is waited for" in shown(*fast).out
    found = json.loads(shown(*fast, "--json").out)
    assert found["rotation"]["workers_enough"] >= 1 and found["groups"] == 2


def test_a_rotation_of_disks_that_are_not_as_here(
    shown: Callable[..., Any], tiny_store: Path, tmp_path: Path
) -> None:
    file = str(written(tiny_store, tmp_path, W1, W2, main=MAIN | ROTATION))
    target = (str(tiny_store), "--cluster", file)
    assert "disk of 2 MB/s and a processor as here" in shown(*target, "--worker-disk", "2").out

    def tokens_per_s(*more: str) -> float:
        found = json.loads(shown(*target, *more, "--json").out)["rotation"]["tokens_per_s"]
        return float(found["token_foreseen"])

    slow, less_slow = (tokens_per_s("--worker-disk", disk) for disk in ("2", "4"))
    assert 1.8 < less_slow / slow < 2.2, "disks decide"
    by_owner = str(written(tiny_store, tmp_path, W1, W2))
    refused = shown(
        str(tiny_store), "--cluster", by_owner, "--worker-disk", "2", code=console.BAD_INPUT
    )
    assert "leave it out" in refused.err
    alone = shown(str(tiny_store), "--memory", "1GiB", "--worker-disk", "2", code=console.BAD_INPUT)
    assert "give --workers or --cluster" in alone.err


def test_experts_that_no_box_has_are_warned_of(
    shown: Callable[..., Any], tiny_store: Path, tmp_path: Path
) -> None:
    main = MAIN | {"share": "1/3", "experts_memory": "100%"}
    file = written(tiny_store, tmp_path, W1 | {"share": "2/3"}, main=main)
    said = shown(str(tiny_store), "--cluster", str(file)).err
    assert "no box has 8" in said and "of 256 experts, the first is L00E" in said, said


def test_one_box_or_several(shown: Callable[..., Any], tiny_store: Path, tmp_path: Path) -> None:
    file = str(written(tiny_store, tmp_path, W1))
    both = shown(str(tiny_store), "--cluster", file, "--memory", "1GiB", code=console.BAD_INPUT)
    assert "leave --memory, --experts-memory and --workers out" in both.err
    none = shown(str(tiny_store), code=console.BAD_INPUT)
    assert "give --memory" in none.err and "--cluster" in none.err


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
