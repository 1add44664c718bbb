"""Calls as Llama 3 writes them: the whole answer is {"name": ..., "parameters": {...}}."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from compute_node.client.grammar import Form
from compute_node.gateway.formats.arguments import call_of
from compute_node.gateway.formats.said import Call, Said, Text

_TAG = "<|python_tag|>"


class Llama3:
    def __init__(self) -> None:
        self._held: str | None = ""  # None: it is text

    def feed(self, text: str) -> Sequence[Said]:
        if self._held is None:
            return [Text(text)] if text else []
        self._held += text
        begun = self._held.lstrip()
        if _TAG.startswith(begun[: len(_TAG)]) or begun.startswith("{"):
            return []
        return self._give_up()

    def end(self) -> Sequence[Said]:
        if not self._held:
            return []
        return _parse(self._held.strip().removeprefix(_TAG)) or self._give_up()

    def _give_up(self) -> Sequence[Said]:
        text, self._held = self._held, None
        return [Text(text)] if text else []


def form(name: str, parameters: Mapping[str, Any]) -> Form:
    return Form(parameters, f'{{"name": {json.dumps(name)}, "parameters": ', "}")


def _parse(text: str) -> Sequence[Call]:
    """Objects with semicolons between them. None at all where something else is."""
    calls: list[Call] = []
    while text:
        try:
            found, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return []
        one = found if isinstance(found, dict) else {}
        call = call_of(one.get("name"), one.get("parameters", one.get("arguments")))
        if not call:
            return []
        calls += call
        text = text[end:].lstrip("; \n")
    return calls
