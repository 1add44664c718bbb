"""What a store says at its local socket becomes the error that the cache acts on.

The other end is played with the messages of `expert_store/face/local_socket.py`, whose kinds
`tests/expert_store/face/test_local_socket.py` holds. Planted fault seen red: every refusal raised
as it is, which ended a request whose session the store had just closed; sessions opened again at
full speed and without end while a local socket refuses them all.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from compute_node.store.borrow import StoreClient
from compute_node.store.local_socket import HungUp, LocalSocket
from compute_node.store.session import SessionLost
from expert_store.store.leases import to_detail
from proto import errors
from proto import expert_store_pb2 as pb
from proto.expert import RecordKey
from tests.local_store import local_store

NAME = "a session"


@pytest.fixture
def ends(run_dir: Path) -> Iterator[tuple[LocalSocket, socket.socket]]:
    """The node's end, and the store's after it was told the session's name."""
    path = run_dir / "local"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        local_socket = LocalSocket(str(path), NAME, 5.0)
        store, _ = listener.accept()
    with store:
        assert store.recv(100) == NAME.encode()
        yield local_socket, store
        local_socket.close()


def refuse(store: socket.socket, error: errors.FlashMoEError) -> None:
    store.send(pb.Exchanged(error=to_detail(error)).SerializeToString())


def test_a_closed_session_is_hung_up_on(ends: tuple[LocalSocket, socket.socket]) -> None:
    """So that the cache opens another and goes on with the same tokens."""
    local_socket, store = ends
    refuse(store, errors.Unavailable("the session is closed: open another"))
    with pytest.raises(HungUp, match="closed"):
        local_socket.receive()


def test_another_refusal_keeps_its_kind(ends: tuple[LocalSocket, socket.socket]) -> None:
    local_socket, store = ends
    refuse(store, errors.SlotsExhausted("ask for fewer"))
    with pytest.raises(errors.SlotsExhausted, match="fewer"):
        local_socket.receive()


def test_a_store_that_goes_is_hung_up_on(ends: tuple[LocalSocket, socket.socket]) -> None:
    local_socket, store = ends
    store.close()
    with pytest.raises(HungUp):
        local_socket.receive()


@contextmanager
def refusing(path: Path) -> Iterator[list[int]]:
    """Another store's local socket in its place; yields how often a node connected."""
    path.unlink()
    connected = [0]

    def refuse_all() -> None:
        while True:
            try:
                store, _ = listener.accept()
            except OSError:  # shut down
                return
            with store:
                store.recv(100)
                connected[0] += 1
                refuse(store, errors.Unavailable("no open session has this name"))

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=refuse_all)
        thread.start()
        try:
            yield connected
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_a_local_socket_that_refuses_every_session_is_given_up(
    tiny_store: Path, run_dir: Path
) -> None:
    with local_store(tiny_store, run_dir, 8) as address, ExitStack() as closing:
        client = StoreClient(address, "n", 4, run_dir / "sessions", deadline_s=0.5)
        closing.callback(client.close)
        client.open()
        assert client.exchange([], [RecordKey.exact(0, 0)])
        with refusing(run_dir / "sessions/exchange.sock") as connected:
            start_s = time.monotonic()
            client.open()
            with pytest.raises(errors.StoreUnavailable, match="lends nothing"):
                while True:
                    with pytest.raises(SessionLost):
                        client.exchange([], [RecordKey.exact(0, 1)])
                    client.open()
            assert connected[0] > 1 and time.monotonic() - start_s >= 0.5, (
                "not for as long as it may"
            )
