"""API keys: one a line of a file, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from proto import errors

_LEAST_CHARACTERS = 8
_CLIENT_CHARACTERS = 12


@dataclass(frozen=True)
class Keys:
    """digests: of all keys; none: everybody may"""

    digests: tuple[bytes, ...] = ()

    @classmethod
    def load(cls, path: Path | None) -> Self:
        """None: no keys. Raises ConfigInvalid for a file that cannot be read, or has none."""
        if path is None:
            return cls()
        try:
            lines = [line.strip() for line in path.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise errors.ConfigInvalid(f"api_key_file {path} cannot be read: {error}") from error
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise errors.ConfigInvalid(f"api_key_file {path} has no key: write one a line")
        if any(len(key) < _LEAST_CHARACTERS for key in keys):
            raise errors.ConfigInvalid(
                f"api_key_file {path} has a key of less than {_LEAST_CHARACTERS} characters: "
                "write a longer one, as `openssl rand -hex 24` makes"
            )
        return cls(tuple(_digest(key) for key in keys))

    @property
    def are_needed(self) -> bool:
        return bool(self.digests)

    def admit(self, headers: Mapping[str, str]) -> str | None:
        """Who calls, by a digest of the key; None: no key, or a wrong one.

        Every key is compared, in a time that does not depend on where the first difference is.
        """
        given = _digest(key_of(headers))
        found = [hmac.compare_digest(given, known) for known in self.digests]
        return f"key {given.hex()[:_CLIENT_CHARACTERS]}" if any(found) else None


def key_of(headers: Mapping[str, str]) -> str:
    """As OpenAI's clients send it, or as Anthropic's do; empty: neither."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key:
        return key.strip()
    return headers.get("x-api-key", "").strip()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
