"""Ports for servers that tests start, and start again.

They lie below those that the kernel gives to connections: one of these could take a server's port
while the server is down.
"""

from __future__ import annotations

import itertools
import os
import socket
from contextlib import suppress

_FIRST, _NUM, _EACH = 20_000, 3_000, 4  # Ray takes its own from 10,002 to 19,999
_numbers = itertools.count(os.getpid() * 101)


def free_port(host: str = "127.0.0.1") -> int:
    """Free at that address, as are the three after it. No two calls of a process give the same."""
    for number in itertools.islice(_numbers, _NUM):
        first = _FIRST + number % _NUM * _EACH
        if all(_is_free(host, first + more) for more in range(_EACH)):
            return first
    raise RuntimeError(f"no port is free at {host}")


def _is_free(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_server((host, port)):
        return True
    return False
