"""Both ends of a short way, over real sockets, in the clear and with certificates.

Planted faults seen red: see the tests.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from proto import direct_socket, errors
from proto.direct_socket import MESSAGE_BYTES, SESSION_BYTES, DirectSocket
from proto.rpc import TlsFiles
from tests.certificates import files, issued

SESSION = bytes(range(SESSION_BYTES))
ADDRESS = "127.0.0.1:0"
Ends = tuple[DirectSocket, DirectSocket]


@contextmanager
def connected(near: TlsFiles | None = None, far: TlsFiles | None = None) -> Iterator[Ends]:
    """The main node's end and the worker's, which has heard SESSION."""
    with direct_socket.listen(ADDRESS, 0) as listener, ThreadPoolExecutor(1) as thread:
        port = listener.getsockname()[1]
        other: Future[tuple[DirectSocket, bytes]] = thread.submit(
            lambda: direct_socket.accepted(listener.accept()[0], far)
        )
        one = direct_socket.connect(ADDRESS, port, SESSION, near)
        try:
            two, session = other.result(20)
            assert session == SESSION
            try:
                yield one, two
            finally:
                two.close()
        finally:
            one.close()


def received(end: DirectSocket, num: int) -> list[bytes]:
    """So many messages, as they come."""
    found: list[bytes] = []
    while len(found) < num:
        assert end.wait(10), f"{len(found)} of {num} came"
        found += end.receive()
    return found


@pytest.fixture(params=["clear", "tls"])
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ends]:
    if request.param == "clear":
        with connected() as found:
            yield found
        return
    issued(tmp_path, "main", "w1")
    with connected(files(tmp_path, "main"), files(tmp_path, "w1")) as found:
        yield found


def test_messages_come_whole_and_in_order(ends: Ends) -> None:
    """Seen red: the second of two that came at once left out, a long one cut."""
    near, far = ends
    messages = [b"", b"a", bytes(70_000), bytes(MESSAGE_BYTES), b"end"]
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(lambda: [near.send(one) for one in messages])
        assert received(far, len(messages)) == messages
        sending.result(10)
    far.send(b"back")
    far.send(b"again")
    assert received(near, 2) == [b"back", b"again"]
    assert not near.wait(0.0) and list(near.receive()) == []


def test_one_that_hung_up_is_named_and_so_is_who_sends_to_it(ends: Ends) -> None:
    near, far = ends
    far.hang_up()
    assert near.wait(10)
    with pytest.raises(errors.Unavailable, match="hung up"):
        list(near.receive())
    with pytest.raises(errors.Unavailable, match="hung up"):
        for _ in range(100):
            near.send(bytes(1000))


def test_one_that_does_not_read_holds_nobody_up(ends: Ends) -> None:
    """Seen red: a send that waits for ever."""
    near, _ = ends
    with pytest.raises(errors.Unavailable, match="does not read"):
        for _ in range(1000):
            near.send(bytes(MESSAGE_BYTES))


def test_a_message_that_is_too_long_is_neither_sent_nor_believed(ends: Ends) -> None:
    """Seen red: memory taken for what a length says."""
    near, far = ends
    with pytest.raises(errors.InvalidRequest, match="exceed"):
        near.send(bytes(MESSAGE_BYTES + 1))
    near._socket.send((MESSAGE_BYTES + 1).to_bytes(4, "little"))
    assert far.wait(10)
    with pytest.raises(errors.MessageInvalid, match="more than"):
        list(far.receive())


def test_a_stranger_without_a_certificate_of_the_authority_is_refused(tmp_path: Path) -> None:
    """And so is a worker that shows one of another's. Seen red: certificates that nobody asks for,
    and names that nobody looks at.
    """
    issued(tmp_path / "ours", "main", "w1")
    issued(tmp_path / "theirs", "main", "w1")
    ours, theirs = (files(tmp_path / one, "w1") for one in ("ours", "theirs"))
    stranger = theirs.model_copy(update={"ca": ours.ca})
    for near, far in ((stranger, ours), (ours, stranger)):
        with pytest.raises(errors.Unavailable), connected(near, far):
            pass
    with pytest.raises(errors.Unavailable, match="not a main node"), connected(None, ours):
        pass


def test_who_says_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen red: a handshake that waits for ever."""
    monkeypatch.setattr("proto.direct_socket.HELLO_S", 0.2)
    with (
        direct_socket.listen(ADDRESS, 0) as listener,
        socket.create_connection(listener.getsockname()) as silent,
    ):
        with pytest.raises(errors.Unavailable, match="says nothing"):
            direct_socket.accepted(listener.accept()[0], None)
        assert silent.recv(1) == b""


def test_nobody_there_and_a_port_that_is_taken() -> None:
    with direct_socket.listen(ADDRESS, 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(errors.ConfigInvalid, match=f"cannot listen on port {port}"):
            direct_socket.listen(ADDRESS, port)
    with pytest.raises(errors.Unavailable, match="nobody answers"):
        direct_socket.connect(ADDRESS, port, SESSION, None)


def test_a_host_of_numbers_with_colons() -> None:
    assert direct_socket.host_and_port("[::1]:9400") == ("::1", 9400)
    assert direct_socket.host_and_port("box.local:9400") == ("box.local", 9400)


def test_hanging_up_wakes_who_waits(ends: Ends) -> None:
    near, _ = ends
    waits = threading.Thread(target=near.wait, args=(20,))
    waits.start()
    near.hang_up()
    waits.join(10)
    assert not waits.is_alive()
