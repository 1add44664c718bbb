"""Answers as gpt-oss writes them, in channels: thoughts in `analysis`, calls in `commentary`, the
answer in `final` (OpenAI's harmony format).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from compute_node.gateway.formats.arguments import call_of
from compute_node.gateway.formats.said import Said, Text, Thought
from compute_node.gateway.formats.scan import Scan

_START, _MESSAGE = "<|start|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", _START)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_FUNCTIONS = "functions."


class Harmony:
    """A message is a header up to <|message|>, then its body."""

    def __init__(self) -> None:
        self._scan, self._header, self._body = Scan(), "", ""
        self._is_body = False

    def feed(self, text: str) -> Sequence[Said]:
        self._scan.add(text)
        said: list[Said] = []
        while self._advance(said):
            pass
        return said

    def end(self) -> Sequence[Said]:
        if not self._is_body:
            header = self._header + self._scan.rest()
            return [Text(header)] if header.strip() and "<|" not in header else []
        said = list(self._say(self._scan.rest()))
        return [*said, *self._close()]

    def _advance(self, said: list[Said]) -> bool:
        """Read up to the next marker. Whether there was one."""
        if self._is_body:
            before, marker = self._scan.up_to(*_ENDS)
            said += self._say(before)
            said += self._close() if marker else ()
        else:
            before, marker = self._scan.up_to(_MESSAGE, *_ENDS)
            self._header = "" if marker in _ENDS else self._header + before
            self._is_body = marker == _MESSAGE
        return bool(marker)

    def _say(self, text: str) -> Sequence[Said]:
        if self._recipient:
            self._body += text
            return []
        kind = Thought if self._channel == "analysis" else Text
        return [kind(text)] if text else []

    def _close(self) -> Sequence[Said]:
        name, body = self._recipient.removeprefix(_FUNCTIONS), self._body
        is_call = bool(self._recipient)
        self._header, self._body, self._is_body = "", "", False
        if not is_call:
            return []
        return call_of(name, body) or [Text(body)]

    @property
    def _channel(self) -> str:
        found = _CHANNEL.search(self._header)
        return found[1] if found else "final"

    @property
    def _recipient(self) -> str:
        found = _RECIPIENT.search(self._header)
        return found[1] if found else ""
