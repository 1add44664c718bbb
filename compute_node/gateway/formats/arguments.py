"""Arguments of a call as JSON, from what models write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from compute_node.gateway.formats.said import Call

Tools = Sequence[Mapping[str, Any]]


def call_of(name: Any, arguments: Any) -> list[Call]:
    """None where it is no call: no name, or arguments that are no object."""
    if isinstance(arguments, str):
        arguments = load(arguments or "{}")
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return []
    return [Call(name, json.dumps(arguments, ensure_ascii=False))]


def load(text: str) -> Any:
    """None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def typed(tools: Tools, name: str, written: Mapping[str, str]) -> dict[str, Any]:
    """Arguments that a model writes as bare text, by the types of the tool's schema: JSON, unless
    it wants a string, or the text is no JSON.
    """
    wanted = _properties(tools, name)
    return {key: _value(wanted.get(key), text) for key, text in written.items()}


def _properties(tools: Tools, name: str) -> Mapping[str, Any]:
    for tool in tools:
        function = tool.get("function", {})
        if function.get("name") == name:
            parameters = function.get("parameters")
            found = parameters.get("properties") if isinstance(parameters, Mapping) else None
            return found if isinstance(found, Mapping) else {}
    return {}


def _value(schema: Any, text: str) -> Any:
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return text
    value = load(text)
    return text if value is None and text.strip() != "null" else value
