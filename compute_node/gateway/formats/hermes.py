"""Calls as Hermes and Qwen write them: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from __future__ import annotations

from collections.abc import Sequence

from compute_node.gateway.formats.arguments import call_of, load
from compute_node.gateway.formats.said import Call

OPENING, CLOSING = "<tool_call>", "</tool_call>"


def parse(inside: str) -> Sequence[Call]:
    found = load(inside)
    if not isinstance(found, dict):
        return []
    return call_of(found.get("name"), found.get("arguments", {}))
