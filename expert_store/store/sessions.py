"""How many bytes of slots each node may hold, and what it holds. Leases outlive a broken stream
while the node's lock does.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import threading
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from expert_store.store.slots import Part, SlotPool
from proto import errors
from proto.expert import RecordKey
from proto.stats import gauge

logger = logging.getLogger(__name__)

_MIB = 1024 * 1024
_PAGE = "flashmoe_store_sessions"


@dataclass(eq=False)
class Session:
    """One node's leases.

    lock_path: held by the node as long as it may read slots; None with chunks
    awaited: acquires under way
    held_bytes: of leases and acquires under way
    """

    session_id: str
    node: str
    quota_bytes: int
    lock_path: Path | None
    leases: dict[RecordKey, Part] = field(default_factory=dict)
    awaited: set[RecordKey] = field(default_factory=set)
    held_bytes: int = 0
    ended: bool = False
    _layer: int = -1  # the latest that it acquired of
    _pass: int = 0  # number of times that it went back to an earlier layer

    def acquires(self, keys: Iterable[RecordKey]) -> None:
        """It is at the layer of these."""
        for key in keys:
            self._pass += key.expert.layer < self._layer
            self._layer = key.expert.layer

    def turn_of(self, key: RecordKey) -> tuple[int, int]:
        """When it may want a record: what sorts first is wanted sooner. A layer that is behind it
        comes again in its next pass.
        """
        layer = key.expert.layer
        return self._pass + (layer <= self._layer), layer


class SessionTable:
    """Every open session, and every orphaned one whose node still holds its lock.

    lock: held around every change; shared with all code that changes slots, on any thread.
    Sessions open and close on the event loop.
    max_leased_bytes: what all quotas together may allow
    lent_bytes: of these, what is for sessions with chunks, and for no others; 0: they share all
    lease_bytes: what a lease counts, by variant
    """

    def __init__(
        self,
        slots: SlotPool,
        lock: threading.RLock,
        max_leased_bytes: int,
        lease_bytes: Mapping[str, int],
        session_dir: Path,
        lock_poll_s: float,
        lent_bytes: int = 0,
    ) -> None:
        self._slots = slots
        self._lock = lock
        self.max_leased_bytes, self._lent_bytes = max_leased_bytes, lent_bytes
        self.lease_bytes = lease_bytes
        self._session_dir = session_dir
        self._lock_poll_s = lock_poll_s
        self._open: set[Session] = set()
        self._orphans: dict[Session, asyncio.Task[None]] = {}

    @property
    @gauge(_PAGE, "Sessions", key="sessions", state="open")
    def num_open(self) -> int:
        return len(self._open)

    @property
    @gauge(_PAGE, "Sessions", key="orphaned_sessions", state="orphaned")
    def num_orphaned(self) -> int:
        return len(self._orphans)

    def open(self, node: str, quota_bytes: int, lock_name: str | None) -> Session:
        """Grant a quota, or not, at once: the sum of all quotas never exceeds what can be leased.

        Raises SlotsExhausted, InvalidRequest (bad quota or lock name, or the lock is not held).
        """
        if quota_bytes <= 0:
            raise errors.InvalidRequest("quota_bytes must be positive")
        lock_path = self._lock_path(lock_name) if lock_name is not None else None
        with self._lock:
            self._sweep()
            session = self._grant(node, quota_bytes, lock_path)
        logger.info("session opened", extra={"node": node, "quota_bytes": quota_bytes})
        return session

    def _grant(self, node: str, quota_bytes: int, lock_path: Path | None) -> Session:
        sessions, most_bytes = [*self._open, *self._orphans], self.max_leased_bytes
        if self._lent_bytes:
            has_lock = lock_path is not None
            sessions = [one for one in sessions if (one.lock_path is not None) == has_lock]
            most_bytes = most_bytes - self._lent_bytes if has_lock else self._lent_bytes
        granted = sum(one.quota_bytes for one in sessions)
        if granted + quota_bytes > most_bytes:
            left = _left(most_bytes - granted, most_bytes)
            raise errors.SlotsExhausted(
                f"{_mib(quota_bytes)} asked, {left}: ask for less, or give the store more"
            )
        session = Session(uuid.uuid4().hex[:12], node, quota_bytes, lock_path)
        self._open.add(session)
        return session

    def find(self, session_id: str) -> Session:
        """The open session of that name. Raises Unavailable."""
        with self._lock:
            for session in self._open:
                if session.session_id == session_id:
                    return session
        raise errors.Unavailable("no open session has this name: open one first")

    def reserve(self, session: Session, keys: Sequence[RecordKey]) -> None:
        """Room for acquires under way.

        Raises Unavailable when the session's stream is gone, InvalidRequest for an expert that is
        leased or awaited already (a second lease would outlive the session), SlotsExhausted beyond
        the quota.
        """
        if session not in self._open:
            raise errors.Unavailable("the session is closed: open another")
        for key in keys:
            if key in session.leases or key in session.awaited:
                raise errors.InvalidRequest(f"{key} is leased by this session already")
        more_bytes = sum(self.lease_bytes[key.variant] for key in keys)
        if session.held_bytes + more_bytes > session.quota_bytes:
            left = _left(session.quota_bytes - session.held_bytes, session.quota_bytes)
            raise errors.SlotsExhausted(
                f"{_mib(more_bytes)} more asked, {left}: release some in the same message"
            )
        session.held_bytes += more_bytes
        session.awaited.update(keys)

    def has_room(self, session: Session, key: RecordKey) -> bool:
        """Whether its quota allows another acquire."""
        return session.held_bytes + self.lease_bytes[key.variant] <= session.quota_bytes

    def lease(self, session: Session, key: RecordKey, part: Part) -> bool:
        """An awaited record becomes a lease; False when the session ended meanwhile."""
        session.awaited.discard(key)
        if session.ended:
            return False
        self._slots.lease(part)
        session.leases[key] = part
        return True

    def drop_awaited(self, session: Session, key: RecordKey) -> None:
        """An awaited record will not come: the quota has its bytes again."""
        session.awaited.discard(key)
        session.held_bytes -= self.lease_bytes[key.variant]

    def release(self, session: Session, keys: Iterable[RecordKey]) -> None:
        """Raises InvalidRequest for a key the session does not hold."""
        with self._lock:
            for key in keys:
                part = session.leases.pop(key, None)
                if part is None:
                    raise errors.InvalidRequest(f"{key} is not leased by this session")
                session.held_bytes -= self.lease_bytes[key.variant]
                self._slots.release(part)

    def _sweep(self) -> None:
        """End sessions whose node let go of its lock, before their stream or a poll tells us."""
        for session in [*self._open, *self._orphans]:
            if session.lock_path is not None and lock_is_free(session.lock_path):
                self._end(session)

    def close(self, session: Session) -> None:
        """The stream ended: give the leases back, now or when the node lets go of its lock."""
        if session.ended:
            return
        if session.lock_path is None or lock_is_free(session.lock_path):
            self._end(session)
        else:
            with self._lock:
                self._open.remove(session)
            logger.warning(
                "session orphaned", extra={"node": session.node, "slots": len(session.leases)}
            )
            self._orphans[session] = asyncio.create_task(self._await_lock(session))

    def stop(self) -> None:
        for task in self._orphans.values():
            task.cancel()

    async def _await_lock(self, session: Session) -> None:
        assert session.lock_path is not None
        while not lock_is_free(session.lock_path):  # noqa: ASYNC110  another process's lock
            await asyncio.sleep(self._lock_poll_s)
        self._end(session)

    def _end(self, session: Session) -> None:
        """Give everything back, once."""
        with self._lock:
            if session.ended:
                return
            session.ended = True
            self._open.discard(session)
            self.release(session, list(session.leases))
            for part in self._slots.wished_by(session):
                self._slots.take_back(part, session)
        waiting = self._orphans.pop(session, None)
        if waiting is not None and waiting is not asyncio.current_task():
            waiting.cancel()
        if session.lock_path is not None:
            session.lock_path.unlink(missing_ok=True)
        logger.info("session ended", extra={"node": session.node})

    def _lock_path(self, name: str) -> Path:
        if Path(name).name != name or name.startswith(".") or not name.endswith(".lock"):
            raise errors.InvalidRequest(f"lock name {name!r} is not a plain *.lock file name")
        path = self._session_dir / name
        try:
            free = lock_is_free(path)
        except (OSError, ValueError) as error:  # too long, a folder, a link, a zero byte
            raise errors.InvalidRequest(f"lock name {name!r} is not a lock: {error}") from error
        if free:
            raise errors.InvalidRequest(f"nobody holds the lock {name!r}: hold it before opening")
        return path


def _left(left_bytes: int, of_bytes: int) -> str:
    return f"{_mib(left_bytes)} of {_mib(of_bytes)} left"


def _mib(count: int) -> str:
    return f"{count / _MIB:,.1f} MiB"


def lock_is_free(path: Path) -> bool:
    """Whether nobody holds an flock on the file (a missing file is free)."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


async def await_free_locks(session_dir: Path, poll_s: float, wait_s: float) -> None:
    """Wait until no node of an earlier store still reads the segment; clear what dead ones left.

    Raises AlreadyRunning naming the lock after `wait_s`.
    """
    deadline = asyncio.get_running_loop().time() + wait_s
    for path in _lock_files(session_dir):
        while not lock_is_free(path):
            if asyncio.get_running_loop().time() > deadline:
                raise errors.AlreadyRunning(
                    f"a node still reads the old segment (it holds {path}): stop that node"
                )
            await asyncio.sleep(poll_s)
        path.unlink(missing_ok=True)


def _lock_files(session_dir: Path) -> list[Path]:
    session_dir.mkdir(parents=True, exist_ok=True)
    return sorted(session_dir.glob("*.lock"))
