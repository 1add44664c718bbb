"""Calls as GLM-4.5 writes them: <tool_call>NAME, then <arg_key> and <arg_value> in turn."""

from __future__ import annotations

import re
from collections.abc import Sequence

from compute_node.gateway.formats.arguments import Tools, call_of, typed
from compute_node.gateway.formats.said import Call

_CALL = re.compile(r"\s*([^\s<]+)\s*((?:<arg_key>.*)?)", re.DOTALL)
_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def parse(inside: str, tools: Tools) -> Sequence[Call]:
    found = _CALL.fullmatch(inside)
    if found is None:
        return []
    written = {key.strip(): value for key, value in _ARGUMENT.findall(found[2])}
    return call_of(found[1], typed(tools, found[1], written))
