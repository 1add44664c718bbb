"""The short way says what the stream says, and refuses what the stream refuses.

Planted faults seen red: sending that waits for a node that does not listen, a socket for anybody, a
cut-off message taken for whole, lending to a session whose stream ended, releases not acknowledged,
an answer sent to a socket that is closed (and so to whoever has its number next).
"""

from __future__ import annotations

import itertools
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expert_store.face.local_socket import _Caller
from expert_store.store.fill import Deliver
from proto import errors
from proto import expert_store_pb2 as pb
from proto.expert import RecordKey
from proto.rpc import LOCAL_MESSAGE_BYTES
from tests.expert_store.conftest import check_healthy
from tests.expert_store.raw_session import DEADLINE_S, Lock, Wire, exchange
from tests.expert_store.stores import KEYS

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def healthy_afterwards(wire: Wire, folder: Path) -> Iterator[None]:
    yield
    check_healthy(wire, folder)


class Ringer:
    """A node's end, that says whatever it is told to."""

    def __init__(self, path: str, name: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(path)
        self.socket.send(name.encode())

    def exchange(self, *acquires: RecordKey, releases: tuple[RecordKey, ...] = ()) -> None:
        self.socket.send(exchange(acquires, releases).exchange.SerializeToString())

    def next(self) -> pb.Exchanged:
        data = self.socket.recv(1 << 20)
        if not data:
            raise EOFError
        return pb.Exchanged.FromString(data)


@contextmanager
def ringer(wire: Wire, quota_slots: int = 3, name: str | None = None) -> Iterator[Ringer]:
    with Lock(wire.session_dir, f"ringer-{next(_numbers)}.lock") as lock:
        session, opened = wire.open_shared(lock, quota_slots)
        rings = Ringer(opened.local_socket_path, opened.session_id if name is None else name)
        try:
            yield rings
        finally:
            rings.socket.close()
            session.close()
            lock.let_go()


def test_leases_come_as_they_are_ready(wire: Wire) -> None:
    with ringer(wire) as rings:
        rings.exchange(*KEYS[:3])
        leases = []
        while len(leases) < 3:
            leases += rings.next().leases
        assert {RecordKey.from_pb(lease.key) for lease in leases} == set(KEYS[:3])
        rings.exchange(releases=(KEYS[0],))
        assert list(rings.next().leases) == [], "a release alone is acknowledged"
        rings.exchange(KEYS[0])
        assert rings.next().leases[0].bytes_read == 0


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (exchange([RecordKey.exact(0, 99)]).exchange.SerializeToString(), errors.UnknownExpert),
        (exchange(KEYS[:4]).exchange.SerializeToString(), errors.SlotsExhausted),
        (exchange([], [KEYS[0]]).exchange.SerializeToString(), errors.InvalidRequest),
        (b"\xff\xff no message", errors.InvalidRequest),
        (b"x" * (LOCAL_MESSAGE_BYTES + 1), errors.InvalidRequest),
    ],
)
def test_what_is_refused_is_named_and_hung_up_on(
    message: bytes, kind: type[Exception], wire: Wire
) -> None:
    with ringer(wire) as rings:
        rings.socket.send(message)
        reply = rings.next()
        assert errors.KINDS[reply.error.kind] is kind
        with pytest.raises(EOFError):
            rings.next()


def test_a_stranger_is_refused(wire: Wire) -> None:
    for name in ("nobody", "\0\0", "x" * 5000):
        with ringer(wire, name=name) as rings:
            refusal = rings.next().error
            assert "no open session" in refusal.message
            assert errors.KINDS[refusal.kind] is errors.Unavailable, "the node may open another"


def test_a_session_whose_stream_ended_lends_no_more(wire: Wire) -> None:
    """Red where the local socket lends on: those leases would be nobody's."""
    with Lock(wire.session_dir, "ended.lock") as lock:
        session, opened = wire.open_shared(lock)
        rings = Ringer(opened.local_socket_path, opened.session_id)
        rings.exchange(KEYS[0])
        assert rings.next().leases
        session.close()
        wire.until_stats(lambda stats: stats.orphaned_sessions == 1)
        rings.exchange(KEYS[1])
        assert errors.KINDS[rings.next().error.kind] is errors.Unavailable
        rings.socket.close()


def test_a_node_that_does_not_listen_holds_up_nobody(wire: Wire) -> None:
    """Red when the store waits for room in its socket: readers would stand still."""
    with ringer(wire, quota_slots=1) as deaf:
        deaf.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        deaf.exchange(KEYS[0])
        deaf.next()
        try:
            for _ in range(20_000):
                deaf.exchange(KEYS[0], releases=(KEYS[0],))
        except TimeoutError:
            pytest.fail("the store waits for a node that does not listen")
        except OSError:
            pass  # hung up on
        else:
            pytest.fail("the store listened for ever to a node that does not")


def test_who_hung_up_is_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """What it asked for is read all the same, and comes when its socket's number is another's."""
    asked: list[Deliver] = []
    sessions = SimpleNamespace(find=lambda name: None, release=lambda session, keys: None)
    store: Any = SimpleNamespace(
        sessions=sessions,
        withdraw=lambda session, keys: None,
        acquire=lambda session, keys, deliver: asked.append(deliver),
        prefetch=lambda session, keys: None,
    )
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    caller = _Caller(far, store, lambda caller: None)
    with near:
        near.send(b"session")
        near.send(exchange([KEYS[0]]).exchange.SerializeToString())
    caller.start()
    caller.join(DEADLINE_S)
    asked[0]([pb.Lease(key=KEYS[0].to_pb())])
    assert far.fileno() == -1
    assert caplog.records == []


def test_its_owner_alone_may_connect(wire: Wire) -> None:
    mode = os.stat(wire.session_dir / "exchange.sock").st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600
