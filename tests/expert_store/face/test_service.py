"""A real store on a real socket: what it answers, what it refuses, and healthy after each.

Planted faults seen red: `_lock_path` without its guard, an error message that does not fit a
trailer, a second lease of one expert left over, releases after acquires, a chunk's checksum of its
own bytes alone. Messages at random are in test_service_messages.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proto import errors, rpc, shm
from proto import expert_store_pb2 as pb
from proto.expert import ModelSpec, RecordKey
from tests.expert_store.conftest import NUM_SLOTS, READ_DEPTH, check_healthy
from tests.expert_store.raw_session import (
    Lock,
    RawSession,
    Wire,
    exchange,
    outcome,
    receive,
)
from tests.expert_store.stores import (
    KEYS,
    PAYLOAD_BYTES,
    expert_bytes,
)


@pytest.fixture(autouse=True)
def healthy_afterwards(wire: Wire, folder: Path) -> Iterator[None]:
    yield
    check_healthy(wire, folder)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"protocol_version": 99}, errors.VersionMismatch),
        ({"fingerprint": "another"}, errors.VersionMismatch),
        ({"quota_bytes": 0}, errors.InvalidRequest),
        ({"quota_bytes": (1 << 64) - 1}, errors.SlotsExhausted),
        ({"transport": 99}, errors.InvalidRequest),
        ({"transport": 1, "lock_name": "../sessions/held.lock"}, errors.InvalidRequest),
        ({"transport": 1, "lock_name": "a\0b.lock"}, errors.InvalidRequest),
        ({"transport": 1, "lock_name": "x" * 300 + ".lock"}, errors.InvalidRequest),
        ({"transport": 1, "lock_name": "x" * 30_000 + ".lock"}, errors.InvalidRequest),
        ({"transport": 1, "lock_name": "nobody-holds-it.lock"}, errors.InvalidRequest),
    ],
)
def test_an_opening_is_refused(changes: dict[str, Any], kind: type[Exception], wire: Wire) -> None:
    with RawSession(wire.stub) as session:
        session.send(wire.opening(**changes))
        with pytest.raises(kind):
            session.next()


@pytest.mark.parametrize(
    ("acquires", "releases", "kind"),
    [
        ([RecordKey.exact(0, 0)], [], errors.UnknownExpert),
        ([RecordKey.exact(1, 6)], [], errors.UnknownExpert),
        ([RecordKey.exact((1 << 32) - 1, (1 << 32) - 1)], [], errors.UnknownExpert),
        ([KEYS[0], KEYS[0]], [], errors.InvalidRequest),
        ([], [KEYS[0]], errors.InvalidRequest),
    ],
)
def test_an_exchange_is_refused_by_kind(
    acquires: list[RecordKey], releases: list[RecordKey], kind: type[Exception], wire: Wire
) -> None:
    with wire.open_chunks(quota_slots=2) as session:
        session.send(exchange(acquires, releases))
        with pytest.raises(kind):
            session.next()


@pytest.mark.parametrize("first", [exchange([KEYS[0]]), pb.SessionRequest()])
def test_a_session_starts_with_its_opening(first: pb.SessionRequest, wire: Wire) -> None:
    with RawSession(wire.stub) as session:
        session.send(first)
        with pytest.raises(errors.InvalidRequest, match="starts with an open"):
            session.next()


def test_a_session_opens_once(wire: Wire) -> None:
    with wire.open_chunks() as session:
        session.send(wire.opening())
        with pytest.raises(errors.InvalidRequest, match="carries exchanges"):
            session.next()


def test_leases_point_at_the_bytes_and_are_given_back_first(wire: Wire, folder: Path) -> None:
    with Lock(wire.session_dir, "shared.lock") as lock:
        session, opened = wire.open_shared(lock, quota_slots=2)
        with session:
            for pair in itertools.pairwise([[], KEYS[0:2], KEYS[2:4], KEYS[4:6]]):
                leases = session.exchange(acquires=pair[1], releases=pair[0])
                assert [RecordKey.from_pb(lease.key) for lease in leases] == pair[1]
                for lease in leases:
                    check_lease(lease, opened, folder)
            assert wire.stats().slots_leased == 2
        lock.let_go()


def check_lease(lease: pb.Lease, opened: pb.Opened, folder: Path) -> None:
    data = memoryview(Path(opened.segment_path).read_bytes())
    layout, epoch = shm.read_header(data, len(data))
    assert (epoch, layout.num_slots) == (opened.epoch, opened.num_slots)
    assert shm.read_generation(data, layout, lease.slot, lease.part) == lease.generation
    start = layout.slot_offset_bytes(lease.slot) + lease.start_bytes + lease.tensor_offsets[0]
    key = RecordKey.from_pb(lease.key)
    assert bytes(data[start : start + PAYLOAD_BYTES]) == expert_bytes(folder, key)


def test_one_expert_asked_for_in_two_messages_at_once(wire: Wire) -> None:
    """Red where neither sees the other's lease: one of the two outlived the session."""
    cold = next(key for key in KEYS[:-1] if key not in wire.resident())
    with Lock(wire.session_dir, "twice.lock") as lock:
        session, _ = wire.open_shared(lock, quota_slots=4)
        for number in range(2):
            session.send(exchange([cold], exchange_id=number))
        assert outcome(session) is errors.InvalidRequest


def test_a_record_comes_in_chunks_under_one_checksum(
    wire: Wire, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "CHUNK_BYTES", 5000)
    with wire.open_chunks() as session:
        session.send(exchange(KEYS[:2]))
        found = receive(session, 2)
        assert {key: found[key][0] for key in KEYS[:2]} == {
            key: expert_bytes(folder, key) for key in KEYS[:2]
        }


def test_chunks_beyond_the_quota_wait_for_those_before_them(wire: Wire, folder: Path) -> None:
    """Planted faults seen red: all of them acquired at once, the next one not lent when a record
    was sent, nor when one is damaged.
    """
    wanted = [*KEYS[:5], KEYS[-1], *KEYS[5:8]]
    with wire.open_chunks(quota_slots=1) as session:
        session.send(exchange(wanted[:4], exchange_id=1))
        session.send(exchange(wanted[4:], exchange_id=2))
        found = receive(session, len(wanted))
    whole = [key for key in wanted if key != KEYS[-1]]
    assert {key: found[key][0] for key in whole} == {k: expert_bytes(folder, k) for k in whole}
    assert found[KEYS[-1]][1].error.kind == errors.ExpertDamaged.__name__


def test_a_damaged_expert_ends_nothing(wire: Wire, folder: Path) -> None:
    with wire.open_chunks(quota_slots=3) as session:
        session.send(exchange([KEYS[0], KEYS[-1], KEYS[1]]))
        found = receive(session, 3)
        assert [found[key][0] for key in KEYS[:2]] == [expert_bytes(folder, k) for k in KEYS[:2]]
        detail = found[KEYS[-1]][1].error
        assert errors.KINDS[detail.kind] is errors.ExpertDamaged
        assert "flashmoe verify" in detail.message
    assert list(wire.stats().quarantined) == [str(KEYS[-1])]


def test_a_stream_that_breaks_orphans_its_leases_until_the_lock_is_free(wire: Wire) -> None:
    with Lock(wire.session_dir, "orphan.lock") as lock:
        session, _ = wire.open_shared(lock, quota_slots=6)
        session.exchange(KEYS[:2])
        session.close()
        stats = wire.until_stats(lambda stats: stats.orphaned_sessions == 1)
        assert (stats.sessions, stats.slots_leased) == (0, 2)
        with RawSession(wire.stub) as other:
            other.send(wire.opening(quota_slots=1))
            with pytest.raises(errors.SlotsExhausted):
                other.next()


def test_it_says_what_it_serves_and_what_is_in_memory(wire: Wire) -> None:
    described, spec = wire.describe(), ModelSpec.from_pb(wire.describe().model)
    assert (spec.model_type, spec.num_experts_total) == ("toy", len(KEYS))
    assert (described.num_slots, described.read_depth) == (NUM_SLOTS, READ_DEPTH)
    with wire.open_chunks() as session:
        session.send(exchange([KEYS[7]]))
        receive(session)
    assert KEYS[7] in wire.resident()
    with wire.open_chunks() as session:
        before = wire.stats()
        session.send(exchange([KEYS[7]]))
        assert receive(session)[KEYS[7]][1].bytes_read == 0
    after = wire.stats()
    assert after.shared_hits == before.shared_hits + 1
    assert after.bytes_read == before.bytes_read
