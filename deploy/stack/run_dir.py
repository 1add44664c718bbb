"""Where one stack keeps its sockets, logs and state."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from urllib.parse import quote

from deploy.stack import locks
from proto import errors

CONFIG_NAME = "flashmoe.toml"
SHARED_MEMORY = Path("/dev/shm")
SEGMENT_PREFIX = "flashmoe-"
_MAX_SOCKET_BYTES = 107  # of a path, in Linux
_LONGEST_SOCKET = "sessions/exchange.sock"
_LEAST_FREE_BYTES, _LEAST_FREE_FILES = 1024 * 1024, 32


class RunState(Enum):
    """The state of a stack, as its launcher writes it. ABSENT: no launcher runs here."""

    ABSENT = "absent"
    STARTING = "starting"
    SERVING = "serving"
    STOPPING = "stopping"


_WIDTH = max(len(state.value) for state in RunState)


@dataclass(frozen=True)
class RunDir:
    """One stack's folder."""

    path: Path

    def socket(self, name: str) -> Path:
        return self.path / f"{name}.sock"

    def address(self, name: str) -> str:
        return f"unix:{self.socket(name)}"

    @property
    def redis_url(self) -> str:
        """Of the embedded Valkey."""
        return f"unix://{quote(str(self.socket('valkey')))}"

    def log(self, name: str) -> Path:
        return self.path / f"{name}.log"

    def refusal(self, name: str) -> Path:
        """Where a daemon in a container says why it refuses to start. It tries again when the file
        is removed.
        """
        return self.path / f"{name}.refused"

    @property
    def config(self) -> Path:
        return self.path / CONFIG_NAME

    @property
    def http(self) -> Path:
        """Where the gateway writes host and port that it serves."""
        return self.path / "gateway.http"

    @property
    def lock(self) -> Path:
        """Held by the launcher, which writes the stack's state into it."""
        return self.path / "lock"

    @property
    def segment(self) -> Path:
        digest = hashlib.sha256(str(self.path).encode(errors="surrogateescape")).hexdigest()[:12]
        return SHARED_MEMORY / f"{SEGMENT_PREFIX}{digest}"

    @property
    def presence(self) -> Path:
        """Held by the launcher and by every daemon of the stack. While it is held, the segment is
        in use and the folder is written.
        """
        return presence_of(self.segment)

    def prepare(self, owners: Container[int] | None = None) -> None:
        """Make the folder, or find it owned by one of `owners` (user ids; None: ours).

        Raises ConfigInvalid when no stack can live there: a path that sockets or configuration
        cannot name, no folder, another user's, one that cannot be written, a full disk.
        """
        self._check_path()
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise self.unusable(error) from error
        owner = self.path.stat().st_uid
        if owner not in (owners or (os.geteuid(),)):
            raise errors.ConfigInvalid(
                f"--run-dir {self.path} belongs to the user with the id {owner}: give another"
            )
        self._check_room()

    def _check_path(self) -> None:
        if "~" in self.path.parts:
            raise errors.ConfigInvalid(
                f"--run-dir {self.path}: nothing says which folder ~ is, as HOME is not set or the "
                "shell left it: write the path in full"
            )
        try:
            longest_bytes = len(str(self.path / _LONGEST_SOCKET).encode())
        except UnicodeEncodeError as error:
            shown = os.fsencode(self.path).decode(errors="backslashreplace")
            raise errors.ConfigInvalid(
                f"--run-dir {shown} is no UTF-8, which Valkey is addressed in: give another"
            ) from error
        if "," in str(self.path):
            raise errors.ConfigInvalid(
                f"--run-dir {self.path} has a comma, at which gRPC divides addresses: give another"
            )
        if longest_bytes > _MAX_SOCKET_BYTES:
            room_bytes = _MAX_SOCKET_BYTES - len(f"/{_LONGEST_SOCKET}")
            raise errors.ConfigInvalid(
                f"--run-dir {self.path} is too long for Unix sockets in it: give one of at most "
                f"{room_bytes} bytes (`flashmoe run` makes its own in TMPDIR)"
            )

    def unusable(self, error: OSError) -> errors.ConfigInvalid:
        reason = "it is no folder" if isinstance(error, FileExistsError) else error.strerror
        return errors.ConfigInvalid(
            f"--run-dir {self.path} cannot be used ({reason}): give another"
        )

    def _check_room(self) -> None:
        disk = os.statvfs(self.path)
        no_files = disk.f_files > 0 and disk.f_favail < _LEAST_FREE_FILES
        if disk.f_bavail * disk.f_frsize < _LEAST_FREE_BYTES or no_files:
            raise errors.ConfigInvalid(
                f"the disk of --run-dir {self.path} is full: a stack needs room for its sockets, "
                "logs and state: free some, or give another folder"
            )

    def state(self) -> RunState:
        """The state that a living launcher wrote. Raises OSError when the folder cannot be read.

        STARTING and STOPPING pass by themselves; SERVING holds also while a daemon that died is
        started again. Daemons in containers, or whose launcher was killed, are ABSENT here and may
        answer all the same.
        """
        if not locks.is_held(self.lock):
            return RunState.ABSENT
        said = self.lock.read_text(errors="replace").strip()
        return RunState(said) if said in {state.value for state in RunState} else RunState.STARTING

    @contextmanager
    def claimed(self) -> Iterator[Claim]:
        """Hold the folder for the block. Raises AlreadyRunning, ConfigInvalid."""
        try:
            descriptor = locks.hold(self.lock, locks.LOOK_S)
        except OSError as error:
            raise self.unusable(error) from error
        if descriptor is None:
            raise errors.AlreadyRunning(
                f"a stack runs in {self.path} already: stop it, or give another --run-dir"
            )
        claim = Claim(descriptor)
        try:
            claim.publish(RunState.STARTING)
            yield claim
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class Claim:
    """A run directory held by this process."""

    descriptor: int

    def publish(self, state: RunState) -> None:
        """Write the state that `RunDir.state` reads. All states have one length, so that a full
        disk does not matter after the first.
        """
        os.pwrite(self.descriptor, state.value.ljust(_WIDTH).encode(), 0)


def presence_of(segment: Path) -> Path:
    return segment.with_name(f"{segment.name}.lock")
