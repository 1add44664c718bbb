"""The daemon as a whole: start, refuse to start, drain.

Planted faults seen red: sources not checked at start, sessions cut off without a word at stop,
the segment left behind, a metric without its label.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from compute_node.store.borrow import StoreClient
from expert_store.config import ExpertStoreConfig
from expert_store.store.counters import Counters, SlotCounts
from proto import errors, stats
from proto.process.metrics_page import SnapshotCollector
from proto.rpc import Listen
from tests.expert_store.raw_session import Lock, Wire
from tests.expert_store.stores import FILE_NAME, KEYS, expert_range, flip
from tests.local_store import local_store

SETTINGS: dict[str, Any] = {"read_depth": 2, "lock_poll_s": 0.01, "restart_wait_s": 0.05}


def test_the_real_client_borrows_and_returns(store_dir: Path, run_dir: Path) -> None:
    with local_store(store_dir, run_dir, 8, **SETTINGS) as address, Wire(address, run_dir) as wire:
        client = StoreClient(address, "node", 4, run_dir / "sessions", deadline_s=10)
        client.open()
        arrivals = client.exchange([], KEYS[:3])
        assert sorted(arrival.record for arrival in arrivals) == KEYS[:3]
        assert client.exchange(KEYS[:2], KEYS[3:5])
        assert wire.stats().slots_leased == 3
        client.close()
        wire.until_idle()
    assert not (run_dir / "segment").exists()
    assert not (run_dir / "store.sock").exists()


def test_an_open_session_is_told_that_the_store_stops(store_dir: Path, run_dir: Path) -> None:
    with Wire(f"unix:{run_dir}/store.sock", run_dir) as wire:
        with local_store(store_dir, run_dir, 8, **SETTINGS):
            session = wire.open_chunks()
            lock = Lock(wire.session_dir, "held.lock")
            shared, _ = wire.open_shared(lock)
            shared.exchange([KEYS[0]])
        for stream in (session, shared):
            with pytest.raises(errors.Unavailable, match="stopping: retry"):
                stream.next()
        lock.let_go()
    assert not (run_dir / "segment").exists()


@pytest.mark.parametrize("damage", ["checksum", "truncated"])
def test_it_stops_cleanly_after_damage(damage: str, store_dir: Path, run_dir: Path) -> None:
    """An error must not keep a view into the segment, which then could not be unmapped."""
    with local_store(store_dir, run_dir, 8, **SETTINGS) as address, Wire(address, run_dir) as wire:
        if damage == "checksum":
            flip(store_dir / FILE_NAME, expert_range(KEYS[-1])[0])
        else:
            os.truncate(store_dir / FILE_NAME, expert_range(KEYS[-1]).start + 100)
        with Lock(wire.session_dir, "held.lock") as lock:
            session, _ = wire.open_shared(lock)
            good, bad = session.exchange([KEYS[0], KEYS[-1]])
            assert (good.HasField("error"), bad.HasField("error")) == (False, True)
        session.close()
        wire.until_idle()
    assert not (run_dir / "segment").exists()


def refused(store_dir: Path, run_dir: Path, kind: type[Exception], match: str) -> None:
    with (
        pytest.raises(kind, match=match),
        local_store(store_dir, run_dir, 8, **SETTINGS),
    ):
        pass


# The thread that serves dies of the error it hands over.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
class TestRefusesToStart:
    def test_on_files_that_changed(self, store_dir: Path, run_dir: Path) -> None:
        os.utime(store_dir / FILE_NAME, ns=(1, 1))
        refused(store_dir, run_dir, errors.SourceChanged, "flashmoe verify")
        os.truncate(store_dir / FILE_NAME, 10)
        refused(store_dir, run_dir, errors.SourceChanged, "index again")

    def test_beside_another_store(self, store_dir: Path, run_dir: Path) -> None:
        with local_store(store_dir, run_dir, 8, **SETTINGS) as address:
            refused(store_dir, run_dir, errors.AlreadyRunning, "stop it first")
            with Wire(address, run_dir) as wire:
                assert wire.describe().num_slots == 8

    def test_while_a_node_still_reads_the_old_segment(self, store_dir: Path, run_dir: Path) -> None:
        with Lock(run_dir / "sessions", "node.lock"):
            refused(store_dir, run_dir, errors.AlreadyRunning, r"node\.lock")
        with local_store(store_dir, run_dir, 8, **SETTINGS):
            assert not (run_dir / "sessions" / "node.lock").exists()

    def test_on_a_folder_that_is_no_store(self, tmp_path: Path, run_dir: Path) -> None:
        refused(tmp_path, run_dir, errors.ManifestInvalid, "flashmoe index")


def test_metrics_name_every_counter() -> None:
    """By name and label; the same counts reach `flashmoe status` by their keys."""
    counters = Counters(5, 6, 4, 7, 8, 9, 12, 13, 14, 20, 15, busy_s=2.5)
    counters.demand_read_s.observe(1.5)
    counters.prefetch_read_s.observe(0.5)
    shown = stats.snapshot(counters, SlotCounts(1, 2, 3, 4))
    registry = CollectorRegistry()
    registry.register(SnapshotCollector(lambda: shown))
    value = registry.get_sample_value
    assert value("flashmoe_store_reads_total", {"reason": "demand"}) == 5
    assert value("flashmoe_store_reads_total", {"reason": "prefetch"}) == 6
    assert value("flashmoe_store_reads_total", {"reason": "refill"}) == 4
    assert value("flashmoe_store_read_bytes_total") == 7
    assert value("flashmoe_store_shared_hits_total") == 8
    assert value("flashmoe_store_prefetches_dropped_total") == 9
    assert value("flashmoe_store_read_seconds_sum", {"reason": "demand"}) == 1.5
    assert value("flashmoe_store_read_seconds_sum", {"reason": "prefetch"}) == 0.5
    assert value("flashmoe_store_read_seconds_count", {"reason": "refill"}) == 0
    assert value("flashmoe_store_busy_seconds_total") == 2.5
    assert value("flashmoe_store_prefetches_withdrawn_total") == 12
    assert value("flashmoe_store_prefetches_used_total") == 13
    assert value("flashmoe_store_prefetch_wasted_bytes_total") == 14
    assert value("flashmoe_store_prefetch_read_bytes_total") == 20
    assert value("flashmoe_store_prefetch_used_bytes_total") == 15
    counts = {"free": 1, "filling": 2, "leased": 3, "reclaimable": 4}
    assert {s: value("flashmoe_store_slots", {"state": s}) for s in counts} == counts


def test_what_is_held_is_shown(store_dir: Path, run_dir: Path) -> None:
    """Sessions, damaged records and the way of reading, of a store that runs."""
    with local_store(store_dir, run_dir, 8, **SETTINGS) as address, Wire(address, run_dir) as wire:
        flip(store_dir / FILE_NAME, expert_range(KEYS[-1])[0])
        with Lock(run_dir / "sessions", "held.lock") as lock:
            session, _ = wire.open_shared(lock)
            session.exchange([KEYS[-1]])
            found = wire.stats()
            session.close()
    assert (found.sessions, found.orphaned_sessions, found.quarantined_experts) == (1, 0, 1)
    assert found.quarantined == [str(KEYS[-1])]
    assert found.direct_io in (True, False)


CONFIG = """
[expert_store]
address = "unix:/run/s"
store_dir = "/s"
segment_path = "/dev/shm/s"
session_dir = "/run/x"
num_slots = 8
"""


def test_a_config_is_read(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(CONFIG)
    config = ExpertStoreConfig.load(tmp_path / "c.toml")
    assert (config.num_slots, [face.address for face in config.faces]) == (8, ["unix:/run/s"])


def test_a_face_for_others_has_certificates_and_the_own_one_none(tmp_path: Path) -> None:
    """Planted fault seen red: the Unix socket behind TLS, too."""
    tls = 'tls = { cert = "s.pem", key = "s.key", ca = "ca.pem" }\n'
    (tmp_path / "c.toml").write_text(CONFIG + tls + 'listen = "10.0.0.1:9500"\nlent_slots = 4')
    own, others = ExpertStoreConfig.load(tmp_path / "c.toml").faces
    assert own == Listen("unix:/run/s")
    assert others.address == "10.0.0.1:9500" and others.tls is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\udcff",
        "expert_store = 7",
        "[[expert_store]]",
        CONFIG + "[other",
        CONFIG + "num_slot = 9",
        CONFIG + "read_depth = 65",
        CONFIG + "lent_slots = 5",
        CONFIG.replace("8", "0"),
        CONFIG.replace("8", '"x"'),
    ],
)
def test_a_wrong_config_is_refused_by_name(text: str, tmp_path: Path) -> None:
    """A mistyped key, a value out of range, another type, bytes that are no text."""
    (tmp_path / "c.toml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(errors.ConfigInvalid, match=r"c\.toml"):
        ExpertStoreConfig.load(tmp_path / "c.toml")
    with pytest.raises(errors.ConfigInvalid):
        ExpertStoreConfig.load(tmp_path / "missing.toml")
