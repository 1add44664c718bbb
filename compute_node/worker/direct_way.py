"""One main node's short messages, over a connection that its stream names."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from google.protobuf.message import DecodeError

from compute_node.worker.work_queue import Urgency, WorkQueue
from proto import errors
from proto import worker_pb2 as pb
from proto.direct_socket import DirectSocket

logger = logging.getLogger(__name__)

MOST_OPEN = 256  # requests of one main node without a reply

Do = Callable[[pb.WorkRequest, float], pb.WorkReply | None]
"""What the compute thread does for a request, which came at a time in seconds."""


class DirectWay:
    """All but `open` and `hang_up` is the compute thread's. It ends when either end hangs up."""

    def __init__(
        self, connection: DirectSocket, work: WorkQueue, do: Do, after: Callable[[], None]
    ) -> None:
        """after: called after each answer"""
        self._connection, self._work = connection, work
        self._do, self._after = do, after
        self._num_open, self._is_open = 0, True

    def open(self) -> None:
        """Any thread, once."""
        self._work.watch(self._connection.fileno(), self._read)
        self._work.put(Urgency.PREPARE, self._read)  # what came right after its first message

    def hang_up(self) -> None:
        """Any thread; the compute thread hears of it."""
        self._connection.hang_up()

    def _read(self) -> None:
        if not self._is_open:
            return
        try:
            for message in self._connection.receive():
                self._take(pb.WorkRequest.FromString(message))
        except (errors.FlashMoEError, DecodeError) as error:
            self._close(error)

    def _take(self, request: pb.WorkRequest) -> None:
        """Raises SlotsExhausted."""
        if self._num_open >= MOST_OPEN:
            raise errors.SlotsExhausted(f"{MOST_OPEN} requests have no reply yet: wait")
        self._num_open += 1
        self._work.put(urgency_of(request), partial(self._answer, request, time.monotonic()))

    def _answer(self, request: pb.WorkRequest, came_s: float) -> None:
        self._num_open -= 1
        reply = self._do(request, came_s)
        if reply is None:
            return
        if self._is_open:
            try:
                self._connection.send(reply.SerializeToString())
            except (errors.Unavailable, errors.InvalidRequest) as error:
                self._close(error)
        self._after()

    def _close(self, why: Exception) -> None:
        logger.info("direct way ends", extra={"reason": str(why)})
        self._is_open = False
        self._work.forget(self._connection.fileno())
        self._connection.close()


def urgency_of(request: pb.WorkRequest) -> Urgency:
    if request.prepares:
        return Urgency.PREPARE
    is_decode = request.num_tokens == max(1, len(request.sequences))
    return Urgency.TOKEN if is_decode else Urgency.PROMPT
