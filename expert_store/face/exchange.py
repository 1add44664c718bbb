"""One exchange of a session, whichever way its messages came: releases, withdrawals, acquires,
prefetches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from expert_store.store.sessions import Session
from expert_store.store.store import ExpertStore
from proto import expert_pb2
from proto import expert_store_pb2 as pb
from proto.expert import RecordKey


def perform(
    store: ExpertStore,
    session: Session,
    exchange: pb.Exchange,
    acquire: Callable[[Sequence[RecordKey]], None],
) -> None:
    """Do what the message says. acquire: has records lent to the session

    Raises what releases, acquires and prefetches raise; what was done before stays done.
    """
    store.sessions.release(session, _keys(exchange.releases))
    store.withdraw(session, _keys(exchange.withdrawals))
    acquire(_keys(exchange.acquires))
    store.prefetch(session, _keys(exchange.prefetches))


def is_acknowledged(exchange: pb.Exchange) -> bool:
    """Whether the exchange is answered although no lease will come."""
    return bool(exchange.releases) and not exchange.acquires


def _keys(messages: Iterable[expert_pb2.RecordKey]) -> list[RecordKey]:
    return [RecordKey.from_pb(message) for message in messages]
