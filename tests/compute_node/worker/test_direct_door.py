"""Who may come in by the short way: one connection a stream, as long as that is open.

Planted faults seen red: any session let in, a second connection for one, a way that outlives its
stream, a session that is no secret, requests without end.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from compute_node.cache.asked import never
from compute_node.worker.direct_door import DirectDoor
from compute_node.worker.direct_way import MOST_OPEN, DirectWay
from compute_node.worker.sessions import Sessions
from compute_node.worker.work_queue import WorkQueue
from proto import direct_socket, errors
from proto import worker_pb2 as pb
from proto.direct_socket import SESSION_BYTES, DirectSocket
from proto.rpc import Listen
from tests.stack import wait_for

SESSION, OTHER = bytes([1] * SESSION_BYTES), bytes([2] * SESSION_BYTES)
ADDRESS = "127.0.0.1:0"


class Door:
    """Of a worker that answers by the request's id, on a thread of its own. may_answer: it waits"""

    def __init__(self) -> None:
        self.sessions, self.may_answer = Sessions(), threading.Event()
        self.may_answer.set()
        self.port = 0

    @contextmanager
    def open(self) -> Iterator[None]:
        with WorkQueue() as queue:

            def do(request: pb.WorkRequest, came_s: float) -> pb.WorkReply:
                self.may_answer.wait(20)
                return pb.WorkReply(id=request.id)

            def take_in(connection: DirectSocket, session: bytes) -> bool:
                return self.sessions.take_in(
                    session, lambda gone: DirectWay(connection, queue, do, never)
                )

            thread = threading.Thread(target=queue.run, daemon=True)
            thread.start()
            with DirectDoor(Listen(ADDRESS), 0, take_in) as door:
                self.port = door.port
                yield
            queue.stop()
            thread.join(20)
            assert not thread.is_alive()

    @contextmanager
    def come(self, session: bytes) -> Iterator[DirectSocket]:
        connection = direct_socket.connect(ADDRESS, self.port, session, None)
        try:
            yield connection
        finally:
            connection.close()


@pytest.fixture
def door() -> Iterator[Door]:
    found = Door()
    with found.open():
        found.sessions.begin(SESSION, threading.Event())
        yield found
        found.sessions.end(SESSION)


def answers(connection: DirectSocket) -> bool:
    """Else it hangs up."""
    connection.send(pb.WorkRequest(id=7, num_tokens=1).SerializeToString())
    assert connection.wait(10)
    try:
        [reply] = connection.receive()
    except errors.Unavailable:
        return False
    return pb.WorkReply.FromString(reply).id == 7


def test_a_stream_has_one_connection(door: Door) -> None:
    with door.come(SESSION) as first, door.come(OTHER) as stranger:
        assert answers(first) and not answers(stranger)
        with door.come(SESSION) as second:
            assert not answers(second)
        assert answers(first)


def test_what_comes_right_after_the_first_message_is_answered(door: Door) -> None:
    """Seen red: it waits until more comes."""
    for _ in range(50):
        with door.come(SESSION) as connection:
            assert answers(connection)
        door.sessions.end(SESSION)
        door.sessions.begin(SESSION, threading.Event())


def test_it_ends_with_its_stream(door: Door) -> None:
    with door.come(SESSION) as connection:
        assert answers(connection)
        door.sessions.end(SESSION)
        assert connection.wait(10)
        with pytest.raises(errors.Unavailable):
            list(connection.receive())


def test_a_name_is_a_secret_of_one_stream(door: Door) -> None:
    for session in (SESSION, b"short"):
        with pytest.raises(errors.InvalidRequest, match="16 random bytes"):
            door.sessions.begin(session, threading.Event())


def test_who_asks_without_end_is_hung_up_on(door: Door) -> None:
    door.may_answer.clear()
    with door.come(SESSION) as connection:
        request = pb.WorkRequest(id=7, num_tokens=1).SerializeToString()
        for _ in range(MOST_OPEN + 2):
            connection.send(request)
        door.may_answer.set()

        def is_over() -> bool:
            try:
                return not list(connection.receive()) and False
            except errors.Unavailable:
                return True

        wait_for(is_over, 20, "the worker to hang up")
