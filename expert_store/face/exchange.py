"""One exchange of a session, whichever way its messages came: releases, withdrawals, acquires,
prefetches.
"""

from __future__ import annotations

from collections.abc import Iterable

from expert_store.store.sessions import Session
from expert_store.store.store import Deliver, ExpertStore, Lent
from proto import errors, expert_pb2
from proto import expert_store_pb2 as pb
from proto.expert import RecordKey


def perform(store: ExpertStore, session: Session, exchange: pb.Exchange, deliver: Deliver) -> None:
    """Do what the message says; `deliver` hears of every acquire, as `ExpertStore.acquire` has it.

    Raises what releases, acquires and prefetches raise; what was done before stays done.
    """
    store.sessions.release(session, _keys(exchange.releases))
    store.withdraw(session, _keys(exchange.withdrawals))
    store.acquire(session, _keys(exchange.acquires), deliver)
    store.prefetch(session, _keys(exchange.prefetches))


def is_acknowledged(exchange: pb.Exchange) -> bool:
    """Whether the exchange is answered although no lease will come."""
    return bool(exchange.releases) and not exchange.acquires


def to_lease(item: Lent) -> pb.Lease:
    if item.error is not None:
        return pb.Lease(key=item.key.to_pb(), error=to_detail(item.error))
    return pb.Lease(
        key=item.key.to_pb(),
        slot=item.slot,
        generation=item.generation,
        tensor_offsets=item.tensor_offsets,
        bytes_read=item.bytes_read,
        read_s=item.read_s,
        verify_s=item.verify_s,
    )


def to_detail(error: errors.FlashMoEError) -> expert_pb2.ErrorDetail:
    return expert_pb2.ErrorDetail(kind=type(error).__name__, message=str(error))


def _keys(messages: Iterable[expert_pb2.RecordKey]) -> list[RecordKey]:
    return [RecordKey.from_pb(message) for message in messages]
