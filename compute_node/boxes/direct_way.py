"""The short way to a worker: the compute thread itself sends and receives."""

from __future__ import annotations

import threading
from collections.abc import Callable

from google.protobuf.message import DecodeError

from compute_node.boxes.work import Work
from proto import errors
from proto import worker_pb2 as pb
from proto.direct_socket import MESSAGE_BYTES, DirectSocket

_BESIDE_BYTES = 16 * 1024  # of a message, beside rows


class DirectWay:
    """Any thread.

    hear:   called with each reply, and whether somebody waited for it
    broken: called when the worker hung up; it may come more than once
    """

    def __init__(
        self,
        connection: DirectSocket,
        hear: Callable[[pb.WorkReply, bool], None],
        broken: Callable[[], object],
    ) -> None:
        self._connection, self._hear, self._broken = connection, hear, broken
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self._is_open = True

    @staticmethod
    def takes(work: Work) -> bool:
        """Whether request and reply are short enough."""
        num_rows = len(work.hidden) * (1 + len(work.topk_ids[0]))
        return num_rows * work.hidden[0].nbytes + _BESIDE_BYTES <= MESSAGE_BYTES

    def send(self, request: bytes) -> None:
        """A WorkRequest. Waits for nobody."""
        try:
            with self._sending:
                if self._is_open:
                    self._connection.send(request)
        except (errors.Unavailable, errors.InvalidRequest):
            self._broken()

    def take_in(self, timeout_s: float) -> None:
        """Hear what has come; wait so long for it."""
        with self._receiving:
            if self._is_open:
                self._take_in(timeout_s)

    def look(self) -> None:
        """Hear what has come, unless another thread does."""
        if self._receiving.acquire(blocking=False):
            try:
                if self._is_open:
                    self._take_in(0.0)
            finally:
                self._receiving.release()

    def close(self) -> None:
        self._connection.hang_up()  # wakes who waits
        with self._sending, self._receiving:
            self._is_open = False
            self._connection.close()

    def _take_in(self, timeout_s: float) -> None:
        try:
            is_here = self._connection.wait(0.0)
            if is_here or self._connection.wait(timeout_s):
                for message in self._connection.receive():
                    self._hear(pb.WorkReply.FromString(message), not is_here)
        except (errors.FlashMoEError, DecodeError):
            self._broken()
