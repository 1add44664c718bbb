"""Where one stack keeps its sockets, logs and state."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from proto import errors

CONFIG_NAME = "flashmoe.toml"
_MAX_SOCKET_PATH = 100


@dataclass(frozen=True)
class RunDir:
    """One stack's folder."""

    path: Path

    def socket(self, name: str) -> Path:
        return self.path / f"{name}.sock"

    def address(self, name: str) -> str:
        return f"unix:{self.socket(name)}"

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
        """Raises ConfigInvalid when sockets there would have too long a path."""
        longest = len(str(self.socket("compute_node")))
        if longest > _MAX_SOCKET_PATH:
            raise errors.ConfigInvalid(
                f"--run-dir {self.path} is too long for a Unix socket: give a shorter one"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise errors.ConfigInvalid(
                f"--run-dir {self.path} cannot be made ({error.strerror}): give another"
            ) from error
