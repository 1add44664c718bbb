"""What a main node asks of one worker, and what is made of how it answers. The main node's compute
thread asks and waits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as StillWorking

from torch import Tensor

from compute_node.boxes.answer import Answer
from compute_node.boxes.box_residents import BoxResidents
from compute_node.boxes.direct_way import DirectWay
from compute_node.boxes.latency import Latency, slow_s
from compute_node.boxes.probe import Probe
from compute_node.boxes.rest import Rest
from compute_node.boxes.stream import WorkerStream
from compute_node.boxes.times import Times
from compute_node.boxes.work import Work, tensor_of
from proto import errors, rpc
from proto import worker_pb2 as pb
from proto.expert import ModelSpec
from proto.held_experts import ALL_EXPERTS, HeldExperts
from proto.stats import counter, gauge

logger = logging.getLogger(__name__)

_POLL_S = 0.02
_SOON = 2.0  # times what an answer takes that needs no read
_LONGEST_BEHIND_S = 30.0  # then the stream is opened anew
_WORK, _HELP = "flashmoe_node_worker_requests", "Work given to other boxes"
_BYTES, _BYTES_HELP = "flashmoe_node_worker_bytes", "Activations to and from other boxes"


class WorkerLink:
    """To one worker. Use as a context manager; it connects in the background, and again whenever
    the stream breaks. `ask` and `wait` are the compute thread's.

    A worker that is late gets no work until it has answered: whatever it were given would wait
    behind that, and so would the main node, once a layer. One that fails, or takes longer than the
    main node would by itself, three times in a row, is left alone for a while.

    probe: what a worker must compute with the same bits before it is given work
    """

    num_answered: int = counter(_WORK, _HELP, key="answered", outcome="answered")
    num_late: int = counter(_WORK, _HELP, key="late", outcome="late")
    num_failed: int = counter(_WORK, _HELP, key="failed", outcome="failed")
    num_prepared: int = counter(
        "flashmoe_node_worker_prepared",
        "Experts that boxes were asked to read ahead",
        key="prepared",
    )
    num_moved: int = counter(
        "flashmoe_node_worker_moved",
        "Experts that boxes were asked to hold from then on",
        key="moved",
    )
    bytes_sent: int = counter(_BYTES, _BYTES_HELP, key="bytes_sent", way="sent")
    bytes_received: int = counter(_BYTES, _BYTES_HELP, key="bytes_received", way="received")

    def __init__(
        self,
        address: str,
        spec: ModelSpec,
        probe: Probe,
        tls: rpc.TlsFiles | None = None,
        cost: float = 1.0,
    ) -> None:
        """cost: of an expert there, over what it is on the main node"""
        self.address, self.cost = address, cost
        self._stream = WorkerStream(address, spec, probe, tls, self)
        self._open: dict[int, Answer] = {}
        self._lock = threading.Lock()
        self._number = 0
        self._behind_since_s: float | None = None  # a given-up answer has not come
        self.slots = 0  # experts that it holds at once; 0: it never joined
        self.held = ALL_EXPERTS  # those that its store has
        self.residents, self.times = BoxResidents(), Times()
        self._rest = Rest(address)
        self._latency = {True: Latency(), False: Latency()}  # by whether it is a decode step

    def __enter__(self) -> WorkerLink:
        self._stream.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.__exit__()

    @property
    @gauge("flashmoe_node_worker_up", "Whether a box is given work", key="up")
    def is_up(self) -> bool:
        if self._behind_since_s is not None:
            self._look_for_late(self._behind_since_s)
        return self.is_joined and not self._rest

    @property
    def is_joined(self) -> bool:
        """Whether it answers, though it may rest."""
        return self._behind_since_s is None and self._stream.takes_work

    @property
    def expert_s(self) -> float:
        """Of one in memory there, at its cost."""
        return self.cost * self.times.expert_s

    @property
    def read_s(self) -> float:
        """Of one there, at its cost; 0: not known."""
        return self.cost * self.times.read_s

    def wait_up(self, timeout_s: float) -> bool:
        """Whether it takes work by then. Raises what it is refused for: VersionMismatch,
        OtherBits.
        """
        return self._stream.wait_up(timeout_s)

    def ask(self, work: Work, own_s: float = 0.0) -> Answer:
        """Send it. Blocks for nothing. own_s: it takes the main node by itself; 0: not known"""
        late_s = self._latency_of(work).late_s(work.size)
        self._number += 1
        request = work.to_pb(self._number)
        answer = Answer(self._number, work, time.monotonic(), late_s, slow_s(own_s))
        answer.is_direct = self._stream.direct is not None and DirectWay.takes(work)
        with self._lock:
            self._open[answer.number] = answer
        self.bytes_sent += self._stream.send(request, answer.is_direct)
        if not self._stream.takes_work:
            self._fail_all("the stream broke")
        return answer

    def prepare(self, layer: int, experts: Sequence[int]) -> None:
        """Have it read these, ascending. Any thread; blocks for nothing, and nothing comes back."""
        request = pb.WorkRequest(layer=layer, experts=experts, prepares=True)
        self.num_prepared += len(experts)
        self._have_read(request)

    def move_in(self, layer: int, experts: Sequence[int]) -> None:
        """As `prepare`, and it holds them from then on, if its policy does."""
        request = pb.WorkRequest(layer=layer, experts=experts, prepares=True, moves=True)
        self.num_moved += len(experts)
        self._have_read(request)

    def wait(self, answer: Answer, check: Callable[[], None]) -> Tensor | None:
        """Its rows, as `made_of` of the work's sequences gives them; None: it is late or failed,
        and the caller computes the work itself. check: called meanwhile; may raise
        """
        while True:
            check()
            late_in_s = answer.asked_s + answer.late_s - time.monotonic()
            try:
                rows = self._rows_of(answer, min(_POLL_S, max(0.0, late_in_s)))
            except StillWorking:
                if late_in_s <= 0 and self._give_up(answer):
                    return None
            except errors.FlashMoEError as error:
                self.refuse(error)
                return None
            else:
                self.num_answered += 1
                if answer.took_s > answer.slow_s:
                    self._rest.missed(answer.took_s)
                else:
                    self._rest.came()
                return rows

    def comes_soon(self, answer: Answer) -> bool:
        """Wait for it twice as long as one takes for which nothing is read. Whether waiting is all
        that remains to be done: it has come or failed, or how long that takes is not known.
        """
        took_s = self.times.way_s + len(answer.work.experts) * self.times.expert_s
        if took_s > answer.late_s:  # not known, too
            return True
        left_s = answer.asked_s + _SOON * took_s - time.monotonic()
        try:
            self._rows_of(answer, max(0.0, left_s))
        except StillWorking:
            return False
        except errors.FlashMoEError:
            return True
        return True

    def need_not_wait(self, answer: Answer) -> bool:
        """It has come, or is late. Waits for nothing."""
        if not answer.rows.done() and answer.is_direct and (direct := self._stream.direct):
            direct.look()
        is_late = time.monotonic() > answer.asked_s + answer.late_s
        return answer.rows.done() or is_late

    def refuse(self, error: errors.FlashMoEError) -> None:
        """What it answered is no answer."""
        self.num_failed += 1
        logger.warning("worker failed", extra={"box": self.address, "reason": str(error)})
        self._rest.missed(0.0)

    def tried(self, work: Work, took_s: float) -> None:
        """Of `Hears`."""
        self._latency_of(work).tried(took_s)

    def joined(self, slots: int, held: HeldExperts) -> None:
        """Of `Hears`."""
        self._rest.end()
        self.held, self.slots = held, slots

    def heard(self, reply: pb.WorkReply, was_awaited: bool) -> None:
        """Of `Hears`."""
        with self._lock:
            answer = self._open.pop(reply.id, None)
            if not any(one.given_up for one in self._open.values()):
                self._behind_since_s = None
        if answer is None:  # of no request
            return
        self.bytes_received += reply.ByteSize()
        if reply.error:
            answer.rows.set_exception(errors.Unavailable(reply.error))
            return
        work, answer.took_s = answer.work, self._took_s(answer, reply, was_awaited)
        self._latency_of(work).heard(min(answer.took_s, answer.slow_s), work.size)
        self.residents.heard(work.layer, reply.resident)
        if work.is_decode:
            self.times.heard(reply, len(work.experts))
        try:
            num_rows = len(reply.rows) // work.hidden[:1].nbytes
            rows = tensor_of(reply.rows, work.hidden.dtype, num_rows)
        except errors.InvalidRequest as error:
            answer.rows.set_exception(error)
        else:
            answer.rows.set_result(rows)

    def ended(self) -> None:
        """Of `Hears`."""
        self._fail_all("the stream broke")
        self.residents.forget()

    def _have_read(self, request: pb.WorkRequest) -> None:
        self.residents.add(request.layer, request.experts)
        self.bytes_sent += self._stream.send(request, is_short=True)

    def _give_up(self, answer: Answer) -> bool:
        """False: it has come after all."""
        with self._lock:
            if answer.number not in self._open:
                return False
            answer.given_up = True
            if self._behind_since_s is None:
                self._behind_since_s = answer.asked_s
        self.num_late += 1
        facts = {"box": self.address, "late_s": round(answer.late_s, 3)}
        logger.warning("worker is late", extra=facts)
        self._rest.missed(answer.late_s)
        return True

    def _rows_of(self, answer: Answer, timeout_s: float) -> Tensor:
        """Raises TimeoutError, and what the worker failed with."""
        direct = self._stream.direct
        if answer.is_direct and direct is not None and not answer.rows.done():
            direct.take_in(timeout_s)
            timeout_s = 0.0
        return answer.rows.result(timeout_s)

    def _look_for_late(self, since_s: float) -> None:
        """Whether what was given up has come. A stream whose worker has not answered for long ends;
        another may do better.
        """
        if (direct := self._stream.direct) is not None:
            direct.look()
        if time.monotonic() - since_s > _LONGEST_BEHIND_S:
            self._stream.end()

    def _latency_of(self, work: Work) -> Latency:
        return self._latency[work.is_decode]

    def _took_s(self, answer: Answer, reply: pb.WorkReply, was_awaited: bool) -> float:
        """From the question until the answer came: not until somebody looked, if nobody waited."""
        took_s, worker_s = time.monotonic() - answer.asked_s, 1e-6 * reply.took_us
        if was_awaited:
            self.times.way(took_s - worker_s)
            return took_s
        return min(took_s, worker_s + self.times.way_s)

    def _fail_all(self, why: str) -> None:
        with self._lock:
            left, self._open = list(self._open.values()), {}
            self._behind_since_s = None
        for answer in left:
            answer.rows.set_exception(errors.Unavailable(why))
