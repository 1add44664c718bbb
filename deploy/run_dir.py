"""Where one stack keeps its sockets, logs and state."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from proto import errors

CONFIG_NAME = "flashmoe.toml"
_MAX_SOCKET_BYTES = 107  # of a path, in Linux
_LONGEST_SOCKET = "sessions/doorbell.sock"


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

    @property
    def config(self) -> Path:
        return self.path / CONFIG_NAME

    @property
    def segment(self) -> Path:
        digest = hashlib.sha256(str(self.path).encode()).hexdigest()[:12]
        return Path(f"/dev/shm/flashmoe-{digest}")

    def prepare(self) -> None:
        """Raises ConfigInvalid for a path that sockets or configuration cannot name, or that cannot
        be made.
        """
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
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise errors.ConfigInvalid(
                f"--run-dir {self.path} cannot be made ({error.strerror}): give another"
            ) from error
