"""An answer that may begin with thoughts between <think> and </think>, as Qwen3, DeepSeek and GLM
write it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from compute_node.gateway.formats.said import AnswerFormat, Said, Thought
from compute_node.gateway.formats.scan import Scan

OPENING, CLOSING = "<think>", "</think>"


class _Place(Enum):
    BEFORE = "before"
    INSIDE = "inside"
    BEHIND = "behind"  # the thoughts, where line breaks are still left out
    AFTER = "after"


class Thinking:
    """inner: reads what comes after the thoughts

    opened: the prompt ended with the opening tag
    """

    def __init__(self, inner: AnswerFormat, *, opened: bool) -> None:
        self._inner, self._scan = inner, Scan()
        self._place = _Place.INSIDE if opened else _Place.BEFORE
        self._is_first = True

    def feed(self, text: str) -> Sequence[Said]:
        self._scan.add(text)
        said: list[Said] = []
        if self._place is _Place.BEFORE:
            self._open()
        if self._place is _Place.INSIDE:
            said += self._think()
        if self._place is _Place.BEHIND:
            self._skip_line_breaks()
        if self._place is _Place.AFTER:
            said += self._inner.feed(self._scan.rest())
        return said

    def end(self) -> Sequence[Said]:
        if self._place is _Place.INSIDE:
            return self._thought(self._scan.rest())
        return [*self._inner.feed(self._scan.rest()), *self._inner.end()]

    def _open(self) -> None:
        """The tag opens thoughts only where nothing was said before it."""
        begun = self._scan.held.lstrip()
        if begun.startswith(OPENING):
            self._scan.held = begun.removeprefix(OPENING)
            self._place = _Place.INSIDE
        elif not OPENING.startswith(begun):
            self._place = _Place.AFTER

    def _think(self) -> Sequence[Said]:
        before, closing = self._scan.up_to(CLOSING)
        if closing:
            self._place = _Place.BEHIND
        return self._thought(before)

    def _thought(self, text: str) -> Sequence[Said]:
        text = text.lstrip("\n") if self._is_first else text
        self._is_first = self._is_first and not text
        return [Thought(text)] if text else []

    def _skip_line_breaks(self) -> None:
        self._scan.held = self._scan.held.lstrip("\n")
        if self._scan.held:
            self._place = _Place.AFTER
