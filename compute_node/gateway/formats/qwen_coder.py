"""Calls as Qwen3-Coder writes them, in tags: <tool_call><function=NAME><parameter=KEY>..."""

from __future__ import annotations

import re
from collections.abc import Sequence

from compute_node.gateway.formats.arguments import Tools, call_of, typed
from compute_node.gateway.formats.said import Call

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>\s*)?", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def parse(inside: str, tools: Tools) -> Sequence[Call]:
    found = _FUNCTION.fullmatch(inside)
    if found is None:
        return []
    name = found[1].strip()
    return call_of(name, typed(tools, name, dict(_PARAMETER.findall(found[2]))))
