"""Where HTTP is served: [HOST:]PORT."""

from __future__ import annotations

import re
from typing import NamedTuple, Self

_WRITTEN = re.compile(r"(?:(?P<host>[^:\[\]\s/]+|\[[0-9a-fA-F:.]+\]):)?(?P<port>\d{1,5})")
_LOOPBACK = "127.0.0.1"


class HostPort(NamedTuple):
    """host: without brackets; port 0: any free one"""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """`8000`, `0.0.0.0:8000`, `[::1]:8000`. Raises ValueError with a remedy."""
        found = _WRITTEN.fullmatch(text)
        if found is None or int(found["port"]) > 65535:
            raise ValueError(f"{text!r} is no [HOST:]PORT: write for example 127.0.0.1:8000")
        return cls((found["host"] or _LOOPBACK).strip("[]"), int(found["port"]))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
