"""The demand arrow's near end: finds the store, opens sessions, borrows experts. Blocking, for
one thread.

A session that breaks takes every lease with it: the caller forgets what it borrowed and borrows
again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from compute_node.store.memory import Borrowed
from compute_node.store.session import SessionLost, StoreDescription, StoreSession
from proto import errors, rpc
from proto import expert_store_pb2 as pb
from proto import expert_store_pb2_grpc as pb_grpc
from proto.expert import ModelSpec, RecordKey
from proto.held_experts import HeldExperts
from proto.protocol import check_version
from proto.stats import fact

_RETRY_S = 0.1
_GAVE_UP = (errors.Cancelled, errors.DeadlineExceeded)  # the caller ended, not the session


class StoreClient:
    """One node's connection to its store.

    most_experts: how many it may borrow at once
    session_dir: where the node's lock files lie; None: another host, bytes come as chunks
    deadline_s:  how long to wait for a store that is away
    """

    def __init__(
        self,
        address: str,
        node: str,
        most_experts: int,
        session_dir: Path | None,
        deadline_s: float,
        tls: rpc.TlsFiles | None = None,
    ) -> None:
        self._channel = rpc.connect(address, tls)
        self._stub = pb_grpc.ExpertStoreStub(self._channel)
        self._address = address
        self._node = node
        self._most_experts = most_experts
        self._session_dir = session_dir
        self._deadline_s = deadline_s
        self._session: StoreSession | None = None
        self._description: StoreDescription | None = None
        self.num_opened = 0
        self._num_fruitless = 0  # sessions in a row that lent nothing

    @property
    @fact("sessions opened after the first", key="store_reconnects")
    def num_reconnects(self) -> int:
        return max(0, self.num_opened - 1)

    def describe(self) -> StoreDescription:
        """Wait for the store and ask what it serves.

        Raises StoreUnavailable after the deadline, VersionMismatch, MessageInvalid.
        """
        reply = self._until_deadline(
            lambda: self._stub.Describe(pb.DescribeRequest(), timeout=self._deadline_s)
        )
        check_version("the store", reply.protocol_version)
        spec = ModelSpec.from_pb(reply.model)
        self._description = StoreDescription(
            spec,
            Path(reply.model_dir),
            reply.slot_bytes,
            reply.num_slots,
            reply.num_spare_slots,
            reply.piece_bytes,
            dict(reply.lease_bytes),
            HeldExperts.from_bytes(reply.held, spec),
            reply.config,
            reply.share,
        )
        return self._description

    @property
    def lends_copies(self) -> bool:
        """Whether what is borrowed has to travel."""
        return self._session_dir is None

    @property
    def is_open(self) -> bool:
        """Whether leases still count; false as soon as the stream breaks, even if nobody waits."""
        return self._session is not None and not self._session.broken

    def open(self, check: Callable[[], None] = lambda: None) -> None:
        """Open a session, waiting for the store if it is away; what was borrowed before is gone.

        check: called while waiting; may raise to give up
        Raises StoreUnavailable after the deadline, also when sessions keep breaking before anything
        was lent; SlotsExhausted, VersionMismatch (another model).
        """
        self.abort()
        self._pause_if_fruitless(check)
        description = self._description or self.describe()
        self._session = self._until_deadline(lambda: self._open_once(description), check)
        self.num_opened += 1
        self._num_fruitless += 1

    def borrow(
        self,
        releases: Sequence[RecordKey],
        acquires: Sequence[RecordKey],
        check: Callable[[], None] = lambda: None,
        prefetches: Sequence[RecordKey] = (),
        withdrawals: Sequence[RecordKey] = (),
    ) -> _Arrivals:
        """Give records back, ask for others, say which may be wanted next and which guesses were
        wrong: said at once, in one message. The iterator blocks for what was asked for, as it
        comes.

        Raises SessionLost (nothing is borrowed any more), InvalidRequest. Iterating raises these
        too, StoreUnavailable when no answer comes before the deadline, ExpertDamaged after all that
        came (which stays borrowed), and what `check` raises: after Cancelled or DeadlineExceeded
        the rest is still on its way, and iterating may go on; after anything else nothing is
        borrowed any more.
        """
        if self._session is None:
            raise SessionLost("there is no session: open one")
        try:
            exchange_id = self._session.begin(releases, acquires, prefetches, withdrawals)
        except BaseException:
            self.abort()
            raise
        return _Arrivals(self, self._session, exchange_id, len(acquires), check)

    def exchange(
        self,
        releases: Sequence[RecordKey],
        acquires: Sequence[RecordKey],
        check: Callable[[], None] = lambda: None,
    ) -> list[Borrowed]:
        """`borrow`, and wait for everything. Raises what it raises; nothing is borrowed any more
        after what `check` raises.
        """
        try:
            parts = self.borrow(releases, acquires, check)
            return [borrowed for part in parts for borrowed in part]
        except _GAVE_UP:
            self.abort()
            raise

    def resident(self) -> list[RecordKey]:
        """What the store has in memory. Raises StoreUnavailable."""
        reply = self._until_deadline(
            lambda: self._stub.Resident(pb.ResidentRequest(), timeout=self._deadline_s)
        )
        return [RecordKey.from_pb(key) for key in reply.keys]

    def is_current(self, borrowed: Borrowed) -> bool:
        """Whether the slot still holds what was lent there."""
        session = self._session
        if session is None:
            return False
        generation = session.memory.generation(borrowed.slot, borrowed.part)
        return generation == borrowed.generation

    def abort(self) -> None:
        """End the session and let go of its lock: the store may refill every slot."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def close(self) -> None:
        self.abort()
        self._channel.close()

    def _pause_if_fruitless(self, check: Callable[[], None]) -> None:
        """A store that opens sessions and serves none is not asked without end, nor at full speed.
        Raises StoreUnavailable, and what `check` raises.
        """
        if self._num_fruitless * _RETRY_S > self._deadline_s:
            self._num_fruitless = 0
            raise errors.StoreUnavailable(
                f"expert_store at {self._address} opens sessions and lends nothing: see its log"
            )
        if self._num_fruitless:
            check()
            time.sleep(_RETRY_S)

    @property
    def deadline_s(self) -> float:
        return self._deadline_s

    def lent(self) -> None:
        """A session lent something: the store serves."""
        self._num_fruitless = 0

    def _open_once(self, description: StoreDescription) -> StoreSession:
        num_slots = min(self._most_experts, description.num_experts)
        return StoreSession.open(self._stub, self._node, num_slots, self._session_dir, description)

    def _may_pass(self, problem: errors.FlashMoEError) -> bool:
        """Whether waiting helps: the store comes back, or notices that our old session ended."""
        if isinstance(problem, errors.SlotsExhausted):
            return self.num_opened > 0
        return isinstance(problem, (errors.Unavailable, errors.SegmentInvalid))

    def _until_deadline(
        self, call: Callable[[], Any], check: Callable[[], None] = lambda: None
    ) -> Any:
        """Repeat `call` while the store is away, up to the deadline."""
        deadline = time.monotonic() + self._deadline_s
        while True:
            check()
            try:
                return call()
            except grpc.RpcError as error:
                problem = errors.from_rpc(error)
            except (errors.Unavailable, errors.SegmentInvalid, errors.SlotsExhausted) as error:
                problem = error
            if not self._may_pass(problem):
                raise problem
            if time.monotonic() > deadline:
                raise errors.StoreUnavailable(
                    f"expert_store at {self._address} stayed away for {self._deadline_s:g} s "
                    f"({problem}): start it, then retry"
                )
            time.sleep(_RETRY_S)


class _Arrivals:
    """What one exchange asked for, in parts as it comes. Unlike a generator it goes on after an
    error.
    """

    def __init__(
        self,
        client: StoreClient,
        session: StoreSession,
        exchange_id: int,
        num_acquires: int,
        check: Callable[[], None],
    ) -> None:
        self._client = client
        self._session = session
        self._exchange_id = exchange_id
        self._num_left = num_acquires
        self._check = check
        self._damage: errors.FlashMoEError | None = None

    def __iter__(self) -> Iterator[list[Borrowed]]:
        return self

    def __next__(self) -> list[Borrowed]:
        """Block until at least one came. See `StoreClient.borrow` for what this raises."""
        try:
            borrowed = self._next_part()
        except (errors.ExpertDamaged, *_GAVE_UP):
            raise
        except BaseException:
            # Leases may be on their way that nobody would account for: end the session as a whole.
            self._client.abort()
            raise
        if not borrowed:
            raise StopIteration
        self._client.lent()
        return borrowed

    def is_ready(self) -> bool:
        """Whether the next part, the end or an error comes without a wait."""
        return not self._num_left or self._session.has_answer(self._exchange_id)

    def _next_part(self) -> list[Borrowed]:
        """Empty when all has come. Raises ExpertDamaged once, after all that came."""
        deadline = time.monotonic() + self._client.deadline_s
        while self._num_left:
            exchanged = self._session.answer(self._exchange_id, deadline, self._check)
            self._num_left -= len(exchanged.leases)
            whole = [lease for lease in exchanged.leases if self._is_whole(lease)]
            if not self._num_left:
                self._session.forget(self._exchange_id)
            if whole:
                return [self._session.borrowed(lease) for lease in whole]
        damage, self._damage = self._damage, None
        if damage is not None:
            raise damage
        return []

    def _is_whole(self, lease: pb.Lease) -> bool:
        if lease.HasField("error"):
            self._damage = errors.from_kind(lease.error.kind, lease.error.message)
            return False
        return True
