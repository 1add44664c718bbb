"""System messages for templates that take none, or none but the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SYSTEM = "system"


def has_system(prompt: Any) -> bool:
    messages = prompt if isinstance(prompt, list) else []
    return any(isinstance(one, Mapping) and one["role"] == _SYSTEM for one in messages)


def merged(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each system message at the head of the user message after it, or as one of its own."""
    found: list[Mapping[str, Any]] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == _SYSTEM:
            waiting.append(message["content"])
        elif message["role"] == "user" and waiting:
            found.append({**message, "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            found.append(message)
    if waiting:
        found.append({"role": "user", "content": "\n\n".join(waiting)})
    return found
