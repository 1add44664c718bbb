"""Calls as Mistral writes them: [TOOL_CALLS] and a JSON list, or a name and [ARGS] before each
object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from compute_node.client.grammar import Form
from compute_node.gateway.formats.arguments import call_of, load
from compute_node.gateway.formats.said import Call

OPENING, _ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"
_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\](.*)", re.DOTALL)


def form(template: str, name: str, parameters: Mapping[str, Any]) -> Form:
    """As the template writes it."""
    if _ARGUMENTS in template:
        return Form(parameters, f"{OPENING}{name}{_ARGUMENTS}")
    space = " " if f"{OPENING} [" in template else ""
    head = f'{OPENING}{space}[{{"name": {json.dumps(name)}, "arguments": '
    return Form(parameters, head, "}]")


def parse(inside: str) -> Sequence[Call]:
    found = load(inside)
    if isinstance(found, list):
        calls = [_call(one) for one in found]
    else:
        calls = [_named(one) for one in inside.split(OPENING)]
    return [call for one in calls for call in one] if all(calls) else []


def _call(found: object) -> list[Call]:
    if not isinstance(found, dict):
        return []
    return call_of(found.get("name"), found.get("arguments", {}))


def _named(text: str) -> list[Call]:
    match = _NAMED.fullmatch(text)
    return call_of(match[1], match[2].strip()) if match else []
