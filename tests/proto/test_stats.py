"""A counter is written in one place, and every reader has it: the Stats call, the metrics page, and
`flashmoe status`.

Planted faults seen red: a property's mark is not looked for, a label given for one of several is
lost, a bool becomes a count, no value becomes 0, an older daemon's answer is taken for zeros.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from deploy.report.status import collect_status
from deploy.report.status_page import status_rows
from deploy.stack.run_dir import RunDir
from expert_store.store.counters import Counters, SlotCounts
from expert_store.store.quarantine import Quarantine
from proto import errors, rpc, stats
from proto import stats_pb2 as pb
from proto.stats import Absent, Stats, counter, fact, gauge, labelled


@dataclass
class Pond:
    """Shown by its fields. frogs: a counter that nobody else has heard of"""

    frogs: int = counter("flashmoe_pond_frogs", "Frogs", colour="green")
    depth_m: float = gauge("flashmoe_pond_depth_m", "Depth", start=0.0)
    name: str = fact("what it is called", start="")
    unseen: int = 3


class Lake:
    """Shown by what it declares, though it is no dataclass."""

    boats: int = counter("flashmoe_lake_boats", "Boats", key="boats_seen")

    @property
    @gauge("flashmoe_lake_is_frozen", "1: it is")
    def is_frozen(self) -> bool:
        return True

    @property
    @fact("by name")
    def fish(self) -> list[str]:
        return ["carp", "pike"]

    @property
    @gauge("flashmoe_lake_age_s", "Since the last visit")
    def age_s(self) -> float | None:
        return None


def found(*sources: object) -> Stats:
    return Stats.from_pb(stats.snapshot(*sources))


def test_fields_and_properties_keep_name_type_and_value() -> None:
    lake = Lake()
    lake.boats += 2
    shown = found(Pond(5, 1.5, "north"), lake)
    assert shown.document() == {
        "frogs{colour=green}": 5,
        "depth_m": 1.5,
        "name": "north",
        "boats_seen": 2,
        "is_frozen": True,
        "fish": ["carp", "pike"],
        "age_s": None,
    }
    assert shown.is_frozen is True and isinstance(shown.depth_m, float)


def test_of_several_alike_each_is_shown_and_the_sum() -> None:
    shown = found(labelled(Pond(2), layer=3), labelled(Pond(5), layer=1), None)
    assert shown.frogs == 7
    assert {layer: pond.frogs for layer, pond in shown.by("layer").items()} == {"3": 2, "1": 5}
    assert shown.of(layer="1", colour="green").document()["frogs"] == 5


def test_what_is_absent_shows_where_it_starts_from() -> None:
    """Red where a node without Redis has no `evidence_sent`, or a page with it."""
    shown = stats.snapshot(Absent(Pond), Absent(Lake))
    assert not [metric.page_name for metric in shown.metrics if metric.page_name]
    found = Stats.from_pb(shown)
    assert (found.frogs, found.depth_m, found.boats_seen, found.age_s) == (0, 0.0, 0, None)


def test_what_has_no_start_must_be_given() -> None:
    """Red when a gauge that nobody set is shown as 0."""
    with pytest.raises(TypeError, match="free"):
        SlotCounts(filling=1, leased=2, reclaimable=3)  # type: ignore[call-arg]
    assert SlotCounts(1, 2, 3, 4) == SlotCounts(1, 2, 3, 4) != SlotCounts(0, 2, 3, 4)


def test_what_is_not_shown_is_named() -> None:
    shown = found(Pond())
    assert shown.get("evidence_sent", 0) == 0
    with pytest.raises(AttributeError, match="shows no 'unseen'"):
        _ = shown.unseen
    with pytest.raises(TypeError, match="depth_m is of type complex"):
        found(Pond(depth_m=1j))  # type: ignore[arg-type]


def test_another_form_is_refused_in_a_sentence() -> None:
    with pytest.raises(errors.VersionMismatch, match="form 2, this program reads form 1: update"):
        Stats.from_pb(pb.Snapshot(version=2))


async def test_a_new_counter_needs_no_other_file(run_dir: Path) -> None:
    """From its declaration above to `flashmoe status --json`, by way of gRPC."""
    sources = Counters(), SlotCounts(1, 2, 3, 4), Sessions(), Quarantine(), Disk(), Pond(frogs=4)

    def answer(request: bytes) -> bytes:
        return stats.snapshot(*sources).SerializeToString()

    facts = await status_of_a_store(run_dir, answer)
    assert facts["slots_leased"] == 3
    assert facts["stats"]["frogs{colour=green}"] == 4


async def test_status_says_that_a_daemon_is_older(run_dir: Path) -> None:
    """It answers with single counters, as up to protocol 2 (field 1 a number, or a text); or some
    are missing.
    """
    without_reads = stats.snapshot(Pond()).SerializeToString()
    for old in (b"\x08\x2a\x18\x07", b"\x0a\x04abcd\x12\x03lru", without_reads):
        facts = await status_of_a_store(run_dir, lambda request, old=old: old)
        assert facts["health"] == "SERVING" and "update the older one" in facts["problem"]
        page = status_rows({"expert_store": facts, **NOBODY}, {})["expert store"]
        assert list(page) == ["health", "problem"]


@dataclass
class Sessions:
    open: int = gauge("flashmoe_store_sessions", "Sessions", key="sessions", start=0)
    orphaned_sessions: int = gauge("flashmoe_store_sessions", "Sessions", start=0)


@dataclass
class Disk:
    busy_share: float = gauge("flashmoe_store_busy_ratio", "Share of the time", start=0.0)


NOBODY: dict[str, dict[str, Any]] = {
    "compute_node": {"health": "away"},
    "scheduler": {"health": "away"},
}


async def status_of_a_store(run_dir: Path, answer: Callable[[bytes], bytes]) -> dict[str, Any]:
    """What `flashmoe status` finds where a store answers to Stats with these bytes."""

    async def handle(request: bytes, context: Any) -> bytes:
        return answer(request)

    def register(server: grpc.aio.Server) -> None:
        handlers = {"Stats": grpc.unary_unary_rpc_method_handler(handle)}
        name = "flashmoe.v1.ExpertStore"
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))

    run = RunDir(run_dir)
    async with rpc.serving(rpc.Listen(run.address("expert_store")), register, (), 0):
        found = await asyncio.to_thread(collect_status, run)
    return found["expert_store"]
