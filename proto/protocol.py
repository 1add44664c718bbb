"""The version of the messages between FlashMoE's processes, and what happens when two differ."""

from __future__ import annotations

from proto import errors

PROTOCOL_VERSION = 5


def check_version(peer: str, version: int) -> None:
    """peer: in words, for example "the store at 10.0.0.2:9400"; version: what it speaks

    Raises VersionMismatch.
    """
    if version != PROTOCOL_VERSION:
        raise errors.VersionMismatch(
            f"{peer} speaks protocol {version}, this program {PROTOCOL_VERSION}: update the older "
            "one"
        )
