"""Whatever is said to a store, in any order: a typed status, and a healthy store afterwards.

Planted faults seen red: a lock name without its guard (one of 300 bytes ended UNKNOWN), an error
message that does not fit a trailer, bytes that are no message ending the reading task alone.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto import errors, rpc
from proto import expert_store_pb2 as pb
from proto.expert import ExpertKey, RecordKey
from tests.expert_store.conftest import check_healthy
from tests.expert_store.raw_session import DEADLINE_S, Lock, RawSession, Wire, exchange, outcome
from tests.expert_store.stores import KEYS

_numbers = itertools.count()
u32, u64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
keys = st.sampled_from(KEYS) | st.builds(
    RecordKey, st.builds(ExpertKey, u32, u32), st.text(max_size=8)
)
key_lists = st.lists(st.sampled_from(KEYS[:3]) | keys, max_size=4)
exchanges = st.builds(exchange, key_lists, key_lists, key_lists, u64)
wrong_fields = {
    "protocol_version": u32,
    "fingerprint": st.text(st.characters(codec="utf-8"), max_size=10),
    "node": st.text(st.characters(codec="utf-8"), max_size=10),
    "quota_bytes": st.sampled_from([0, 1, 96_000, 98_304, 98_305, (1 << 64) - 1]),
    "transport": st.sampled_from([0, 2, 3, 99]),
    "lock_name": st.sampled_from(
        [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "/etc/passwd",
            "a\0b.lock",
            "free.lock",
            "x" * 300 + ".lock",
            "é" * 5000 + ".lock",
        ]
    ),
}
wrong_opens = st.one_of([st.fixed_dictionaries({name: s}) for name, s in wrong_fields.items()])
first_kinds = st.sampled_from(["sound", "wrong", "wrong", "exchange", "empty"])
later_kinds = st.sampled_from(["exchange"] * 6 + ["sound", "wrong", "empty"])


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_any_messages_in_any_order(data: st.DataObject, wire: Wire, folder: Path) -> None:
    with (
        Lock(wire.session_dir, f"held-{next(_numbers)}.lock") as lock,
        RawSession(wire.stub) as session,
    ):
        sound = {"lock_name": lock.path.name, "transport": 1, "quota_slots": 4}
        for number in range(data.draw(st.integers(0, 5))):
            kind = data.draw(later_kinds if number else first_kinds)
            if kind == "exchange":
                session.send(data.draw(exchanges))
            elif kind == "empty":
                session.send(pb.SessionRequest())
            else:
                wrong = data.draw(wrong_opens) if kind == "wrong" else {}
                session.send(wire.opening(**(sound | wrong)))
        session.finish()
        ended = outcome(session)
    assert ended is None or (ended is not errors.FlashMoEError and ended in errors.KINDS.values())
    assert ended is not errors.QueueFull, (
        "gRPC's own RESOURCE_EXHAUSTED: a trailer that is too long"
    )
    check_healthy(wire, folder)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_exchanges_of_an_open_session(data: st.DataObject, wire: Wire, folder: Path) -> None:
    with Lock(wire.session_dir, f"held-{next(_numbers)}.lock") as lock:
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
                assert isinstance(errors.from_rpc(error), errors.InvalidRequest)
    check_healthy(wire, folder)


def test_a_message_that_would_take_the_memory_is_not_decoded(wire: Wire, folder: Path) -> None:
    """Red at 1.4 GB and a minute of the event loop: 15 million keys of two bytes, as objects."""
    most = rpc.LOCAL_MESSAGE_BYTES
    with Lock(wire.session_dir, f"held-{next(_numbers)}.lock") as lock:
        session, _ = wire.open_shared(lock)
        session.send(exchange(withdrawals=[RecordKey.exact(0, 0)] * (most // 2)))
        assert outcome(session) is errors.InvalidRequest
    with Lock(wire.session_dir, f"held-{next(_numbers)}.lock") as lock:
        session, _ = wire.open_shared(lock)
        session.send(exchange(withdrawals=[RecordKey.exact(0, 0)] * (most // 2 - 100)))
        session.finish()
        assert outcome(session) is None
    check_healthy(wire, folder)
