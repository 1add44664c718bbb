"""A real store on a real socket, whatever is said to it: a typed status, and healthy afterwards.

Planted faults seen red: `_lock_path` without its guard (a name of 300 bytes ended UNKNOWN), an
error message that does not fit a trailer, a second lease of one expert left over, releases after
acquires, a chunk's checksum of its own bytes alone, a store that drains without saying so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from proto import errors, rpc, shm
from proto import expert_store_pb2 as pb
from proto.expert import ExpertKey, ModelSpec
from tests.expert_store.raw_session import DEADLINE_S, Lock, RawSession, Wire, exchange
from tests.expert_store.stores import (
    FILE_NAME,
    KEYS,
    PAYLOAD_BYTES,
    expert_bytes,
    expert_range,
    flip,
    write_store,
)
from tests.local_store import local_store

NUM_SLOTS, READ_DEPTH = 8, 2
_numbers = itertools.count()


@pytest.fixture(scope="module")
def folder(module_run_dir: Path) -> Path:
    """The last expert is damaged."""
    write_store(module_run_dir / "store")
    flip(module_run_dir / "store" / FILE_NAME, expert_range(KEYS[-1])[77])
    return module_run_dir / "store"


@pytest.fixture(scope="module")
def wire(folder: Path, module_run_dir: Path) -> Iterator[Wire]:
    settings: dict[str, Any] = {"read_depth": READ_DEPTH, "lock_poll_s": 0.01}
    with (
        local_store(folder, module_run_dir, NUM_SLOTS, **settings) as address,
        Wire(address, module_run_dir) as wire,
    ):
        yield wire


@pytest.fixture(autouse=True)
def healthy_afterwards(wire: Wire, folder: Path) -> Iterator[None]:
    yield
    check_healthy(wire, folder)


def check_healthy(wire: Wire, folder: Path) -> None:
    """Idle, all slots accounted for, and a fresh session for all of the quota gets its bytes."""
    stats = wire.until_idle()
    assert stats.slots_free + stats.slots_reclaimable == NUM_SLOTS
    with wire.open_chunks(quota_slots=NUM_SLOTS - READ_DEPTH) as session:
        key = KEYS[next(_numbers) % (len(KEYS) - 1)]
        session.send(exchange([key], exchange_id=9))
        (found,), exchanged = receive(session)
        assert (found, exchanged.exchange_id) == (expert_bytes(folder, key), 9)
    wire.until_idle()


def receive(session: RawSession) -> tuple[list[bytes], pb.Exchanged]:
    """Records put together from chunks, each compared with its checksum."""
    records, data = [], bytearray()
    while (reply := session.next()).WhichOneof("kind") == "chunk":
        chunk = reply.chunk
        assert len(chunk.data) <= rpc.CHUNK_BYTES
        data += chunk.data
        if chunk.last:
            assert xxhash.xxh3_64_intdigest(data) == chunk.checksum
            records.append(bytes(data))
            data.clear()
    assert not data
    return records, reply.exchanged


def outcome(session: RawSession) -> type[Exception] | None:
    """How the stream ended, after all its replies: None when it ended well."""
    try:
        while True:
            session.next()
    except EOFError:
        return None
    except errors.FlashMoEError as error:
        return type(error)


u32, u64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
keys = st.sampled_from(KEYS) | st.builds(ExpertKey, u32, u32)
key_lists = st.lists(st.sampled_from(KEYS[:3]) | keys, max_size=4)
exchanges = st.builds(exchange, key_lists, key_lists, key_lists, u64)
opens = st.fixed_dictionaries(
    {},
    optional={
        "protocol_version": u32,
        "fingerprint": st.text(st.characters(codec="utf-8"), max_size=10),
        "node": st.text(st.characters(codec="utf-8"), max_size=10),
        "quota_slots": st.sampled_from([0, 1, 6, 7, (1 << 64) - 1]),
        "transport": st.sampled_from([0, 1, 2, 3, 99]),
        "lock_name": st.sampled_from(["", ".", "..", "../x", "a/b", "/etc/passwd", "a\0b", "free"])
        | st.just("é" * 5000),
    },
)
sound = st.sampled_from([{"quota_slots": 4}, {"quota_slots": 4, "transport": 1}])


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_any_messages_in_any_order(data: st.DataObject, wire: Wire, folder: Path) -> None:
    with Lock(wire.session_dir, f"held-{next(_numbers)}") as lock, RawSession(wire.stub) as session:
        held = {"lock_name": lock.path.name}
        for _ in range(data.draw(st.integers(0, 5))):
            kind = data.draw(st.sampled_from(["sound", "open", "empty"] + 6 * ["exchange"]))
            if kind == "exchange":
                session.send(data.draw(exchanges))
            elif kind == "empty":
                session.send(pb.SessionRequest())
            else:
                session.send(
                    wire.opening(**(held | data.draw(sound if kind == "sound" else opens)))
                )
        session.finish()
        ended = outcome(session)
    assert ended is None or (ended is not errors.FlashMoEError and ended in errors.KINDS.values())
    check_healthy(wire, folder)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_exchanges_of_an_open_session(data: st.DataObject, wire: Wire, folder: Path) -> None:
    with Lock(wire.session_dir, f"held-{next(_numbers)}") as lock:
        session, _ = wire.open_shared(lock, quota_slots=4)
        for _ in range(data.draw(st.integers(1, 6))):
            session.send(data.draw(exchanges))
        if data.draw(st.booleans(), "hang up"):
            session.close()
        else:
            session.finish()
            assert outcome(session) is not errors.FlashMoEError
        if data.draw(st.booleans(), "let go first"):
            lock.let_go()
    check_healthy(wire, folder)


@settings(deadline=None, max_examples=40)
@given(messages=st.lists(st.binary(max_size=60), max_size=2), opened=st.booleans())
def test_bytes_that_are_no_message(
    messages: list[bytes], opened: bool, wire: Wire, folder: Path
) -> None:
    """Red where one in mid-session ends the reading task alone: the stream then hangs."""
    opening = [wire.opening().SerializeToString()] if opened else []
    with rpc.connect(f"unix:{wire.session_dir.parent}/store.sock") as channel:
        call = channel.stream_stream("/flashmoe.v1.ExpertStore/Session")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter([*opening, *messages, b"\xff"]), timeout=DEADLINE_S))
        assert isinstance(errors.from_rpc(caught.value), errors.InvalidRequest)
        for method in ("Describe", "Resident", "Stats"):
            unary = channel.unary_unary(f"/flashmoe.v1.ExpertStore/{method}")
            try:
                assert isinstance(unary(b"".join(messages), timeout=DEADLINE_S), bytes)
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.UNKNOWN  # type: ignore[attr-defined]
    check_healthy(wire, folder)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"protocol_version": 99}, errors.VersionMismatch),
        ({"fingerprint": "another"}, errors.VersionMismatch),
        ({"quota_slots": 0}, errors.InvalidRequest),
        ({"quota_slots": (1 << 64) - 1}, errors.SlotsExhausted),
        ({"transport": 99}, errors.InvalidRequest),
        ({"transport": 1, "lock_name": "../sessions/held"}, errors.InvalidRequest),
        ({"transport": 1, "lock_name": "a\0b"}, errors.InvalidRequest),
        ({"transport": 1, "lock_name": "x" * 300}, errors.InvalidRequest),
        ({"transport": 1, "lock_name": "x" * 30_000}, errors.InvalidRequest),
        ({"transport": 1, "lock_name": "nobody-holds-it"}, errors.InvalidRequest),
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
        ([ExpertKey(0, 0)], [], errors.UnknownExpert),
        ([ExpertKey(1, 6)], [], errors.UnknownExpert),
        ([ExpertKey((1 << 32) - 1, (1 << 32) - 1)], [], errors.UnknownExpert),
        ([KEYS[0], KEYS[0]], [], errors.InvalidRequest),
        ([], [KEYS[0]], errors.InvalidRequest),
        (KEYS[:3], [], errors.SlotsExhausted),
    ],
)
def test_an_exchange_is_refused_by_kind(
    acquires: list[ExpertKey], releases: list[ExpertKey], kind: type[Exception], wire: Wire
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
    with Lock(wire.session_dir, "shared") as lock:
        session, opened = wire.open_shared(lock, quota_slots=2)
        with session:
            for pair in itertools.pairwise([[], KEYS[0:2], KEYS[2:4], KEYS[4:6]]):
                leases = session.exchange(acquires=pair[1], releases=pair[0])
                assert [ExpertKey.from_pb(lease.key) for lease in leases] == pair[1]
                for lease in leases:
                    check_lease(lease, opened, folder)
            assert wire.stats().slots_leased == 2
        lock.let_go()


def check_lease(lease: pb.Lease, opened: pb.Opened, folder: Path) -> None:
    data = memoryview(Path(opened.segment_path).read_bytes())
    layout, epoch = shm.read_header(data, len(data))
    assert (epoch, layout.num_slots) == (opened.epoch, opened.num_slots)
    assert shm.read_generation(data, lease.slot) == lease.generation
    start = layout.slot_offset_bytes(lease.slot) + lease.tensor_offsets[0]
    key = ExpertKey.from_pb(lease.key)
    assert bytes(data[start : start + PAYLOAD_BYTES]) == expert_bytes(folder, key)


def test_a_damaged_expert_ends_nothing(wire: Wire, folder: Path) -> None:
    with wire.open_chunks(quota_slots=3) as session:
        session.send(exchange([KEYS[0], KEYS[-1], KEYS[1]]))
        records, exchanged = receive(session)
        assert records == [expert_bytes(folder, key) for key in KEYS[:2]]
        detail = exchanged.leases[1].error
        assert errors.KINDS[detail.kind] is errors.ExpertDamaged
        assert "flashmoe verify" in detail.message
    assert list(wire.stats().quarantined) == [str(KEYS[-1])]


def test_a_stream_that_breaks_orphans_its_leases_until_the_lock_is_free(wire: Wire) -> None:
    with Lock(wire.session_dir, "orphan") as lock:
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
    described = wire.describe()
    spec = ModelSpec.from_pb(described.model)
    assert (spec.model_type, spec.num_experts_total) == ("toy", len(KEYS))
    assert (described.num_slots, described.read_depth) == (NUM_SLOTS, READ_DEPTH)
    with wire.open_chunks() as session:
        session.send(exchange([KEYS[7]]))
        receive(session)
    assert KEYS[7] in wire.resident()
    with wire.open_chunks() as session:
        before = wire.stats()
        session.send(exchange([KEYS[7]]))
        assert receive(session)[1].leases[0].bytes_read == 0
    after = wire.stats()
    assert after.shared_hits == before.shared_hits + 1
    assert after.bytes_read == before.bytes_read
