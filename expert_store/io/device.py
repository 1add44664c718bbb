"""What reads files into memory: requests are submitted, and threads wait for them to come."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Whole pages of a file that belong in memory. A customer's subclass adds what it knows it by.

    file:         its number among the files
    offset_bytes: in the file, on a page
    memory:       where the bytes go; stays the device's until they came
    start_bytes:  in `memory`, on a page
    length_bytes: whole pages
    needed_bytes: of length_bytes; the file may end after them
    """

    file: int
    offset_bytes: int
    memory: memoryview
    start_bytes: int
    length_bytes: int
    needed_bytes: int


R = TypeVar("R", bound=Request)


class Device(Protocol[R]):
    """Takes requests in the order in which they are submitted.

    num_readers: threads that wait for them
    """

    num_readers: int

    def submit(self, requests: Sequence[R]) -> None:
        """Called by one thread at a time. Never raises and never waits for the data: what the
        device cannot take comes back with 0 bytes.
        """
        ...

    def wait(self) -> tuple[R, int] | None:
        """Block until a request came. Returns it and how many of its first bytes are in memory: the
        caller reads the rest. None: stop.
        """
        ...

    def stop(self) -> None:
        """Called after the last request came back: every thread's `wait` ends."""
        ...


class ThreadReads(Generic[R]):
    """Reads nothing: hands each request to a thread, which reads it and waits.

    One thread more than the depth: while it hashes, the disk keeps its depth.
    """

    def __init__(self, read_depth: int) -> None:
        self.num_readers = read_depth + 1
        self._requests: queue.SimpleQueue[R | None] = queue.SimpleQueue()

    def submit(self, requests: Sequence[R]) -> None:
        for request in requests:
            self._requests.put(request)

    def wait(self) -> tuple[R, int] | None:
        request = self._requests.get()
        return None if request is None else (request, 0)

    def stop(self) -> None:
        for _ in range(self.num_readers):
            self._requests.put(None)
