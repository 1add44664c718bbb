"""What a store says at its doorbell becomes the error that the cache acts on.

The other end is played with the messages of `expert_store/doorbell.py`, whose kinds
`tests/expert_store/test_doorbell.py` holds. Planted fault seen red: every refusal raised as it is,
which ended a request whose session the store had just closed.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from compute_node.doorbell import Doorbell, HungUp
from expert_store.exchanges import to_detail
from proto import errors
from proto import expert_store_pb2 as pb

NAME = "a session"


@pytest.fixture
def ends(run_dir: Path) -> Iterator[tuple[Doorbell, socket.socket]]:
    """The node's end, and the store's after it was told the session's name."""
    path = run_dir / "doorbell"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        doorbell = Doorbell(str(path), NAME, 5.0)
        store, _ = listener.accept()
    with store:
        assert store.recv(100) == NAME.encode()
        yield doorbell, store
        doorbell.close()


def refuse(store: socket.socket, error: errors.FlashMoEError) -> None:
    store.send(pb.Exchanged(error=to_detail(error)).SerializeToString())


def test_a_closed_session_is_hung_up_on(ends: tuple[Doorbell, socket.socket]) -> None:
    """So that the cache opens another and goes on with the same tokens."""
    doorbell, store = ends
    refuse(store, errors.Unavailable("the session is closed: open another"))
    with pytest.raises(HungUp, match="closed"):
        doorbell.receive()


def test_another_refusal_keeps_its_kind(ends: tuple[Doorbell, socket.socket]) -> None:
    doorbell, store = ends
    refuse(store, errors.SlotsExhausted("ask for fewer"))
    with pytest.raises(errors.SlotsExhausted, match="fewer"):
        doorbell.receive()


def test_a_store_that_goes_is_hung_up_on(ends: tuple[Doorbell, socket.socket]) -> None:
    doorbell, store = ends
    store.close()
    with pytest.raises(HungUp):
        doorbell.receive()
