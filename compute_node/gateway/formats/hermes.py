"""Calls as Hermes and Qwen write them: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from compute_node.client.grammar import Form
from compute_node.gateway.formats.arguments import call_of, load
from compute_node.gateway.formats.said import Call

OPENING, CLOSING = "<tool_call>", "</tool_call>"


def form(name: str, parameters: Mapping[str, Any]) -> Form:
    head = f'{OPENING}\n{{"name": {json.dumps(name)}, "arguments": '
    return Form(parameters, head, f"}}\n{CLOSING}")


def parse(inside: str) -> Sequence[Call]:
    found = load(inside)
    if not isinstance(found, dict):
        return []
    return call_of(found.get("name"), found.get("arguments", {}))
