"""What the cache needs of a store client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from compute_node.store.memory import Borrowed
from proto.expert import RecordKey


class Arrivals(Protocol):
    """What was asked for, in parts as it comes; see `StoreClient.borrow`."""

    def __iter__(self) -> Iterator[list[Borrowed]]: ...

    def __next__(self) -> list[Borrowed]: ...

    def is_ready(self) -> bool:
        """Whether the next part, the end or an error comes without a wait."""
        ...


class Lender(Protocol):
    """See compute_node/store/borrow.py for what each method promises and raises."""

    @property
    def is_open(self) -> bool: ...

    @property
    def lends_copies(self) -> bool: ...

    def open(self, check: Callable[[], None] = ...) -> None: ...

    def borrow(
        self,
        releases: Sequence[RecordKey],
        acquires: Sequence[RecordKey],
        check: Callable[[], None] = ...,
        prefetches: Sequence[RecordKey] = ...,
        withdrawals: Sequence[RecordKey] = ...,
    ) -> Arrivals: ...

    def exchange(
        self,
        releases: Sequence[RecordKey],
        acquires: Sequence[RecordKey],
        check: Callable[[], None] = ...,
    ) -> list[Borrowed]: ...

    def resident(self) -> list[RecordKey]: ...

    def is_current(self, borrowed: Borrowed) -> bool: ...

    def abort(self) -> None: ...
