"""Calls as DeepSeek-V3 and -R1 write them, and as V3.1 does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from compute_node.client.grammar import Form
from compute_node.gateway.formats.arguments import call_of
from compute_node.gateway.formats.said import Call

OPENING, CLOSING = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"  # noqa: RUF001  their spelling
_BEGIN, _SEPARATOR, _END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"  # noqa: RUF001
_FENCE = "```json"
_CALL = re.compile(
    r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?"  # noqa: RUF001
    r"(?P<name>[^<\n]+?)\s*(?:\n```json\n(?P<fenced>.*?)\n```|<｜tool▁sep｜>(?P<bare>.*?))\s*"  # noqa: RUF001
    r"(?:<｜tool▁call▁end｜>|$)",  # noqa: RUF001
    re.DOTALL,
)


def form(template: str, name: str, parameters: Mapping[str, Any]) -> Form:
    """As the template writes it."""
    if _FENCE in template:
        head, end = f"{_BEGIN}function{_SEPARATOR}{name}\n{_FENCE}\n", f"\n```{_END}"
    else:
        head, end = f"{_BEGIN}{name}{_SEPARATOR}", _END
    return Form(parameters, OPENING + head, end + CLOSING)


def parse(inside: str) -> Sequence[Call]:
    """None at all where one of them is no call: the text must not be lost in part."""
    found = [call_of(m["name"], m["fenced"] or m["bare"] or "") for m in _CALL.finditer(inside)]
    left = _CALL.sub("", inside).strip()
    return [] if left or not all(found) else [call for calls in found for call in calls]
