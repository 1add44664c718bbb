"""An answer with calls of tools between two markers, text around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from compute_node.gateway.formats.said import Call, Said, Text
from compute_node.gateway.formats.scan import Scan

Parse = Callable[[str], Sequence[Call]]


class TaggedCalls:
    """parse: makes calls of what stands between the markers; none: it is no call, and stays text

    closing: empty: calls go on to the end of the answer
    """

    def __init__(self, opening: str, closing: str, parse: Parse) -> None:
        self._opening, self._closing, self._parse = opening, closing, parse
        self._scan, self._inside = Scan(), ""
        self._is_inside = False
        self._space = ""  # before a call it is left out

    def feed(self, text: str) -> Sequence[Said]:
        self._scan.add(text)
        said: list[Said] = []
        while True:
            if not self._is_inside:
                before, self._is_inside = self._until_call()
                said += self._text(before)
                if not self._is_inside:
                    return said
            if not self._until_closed():
                return said
            said += self._calls(self._closing)

    def end(self) -> Sequence[Said]:
        self._inside += self._scan.held if self._is_inside else ""
        if self._is_inside:
            return self._calls("")
        return self._text(self._scan.rest())

    def _until_call(self) -> tuple[str, bool]:
        before, opening = self._scan.up_to(self._opening)
        return before, bool(opening)

    def _until_closed(self) -> bool:
        """Keep what stands inside. Whether the call is complete."""
        if not self._closing:
            self._inside += self._scan.rest()
            return False
        before, closing = self._scan.up_to(self._closing)
        self._inside += before
        return bool(closing)

    def _calls(self, closing: str) -> Sequence[Said]:
        inside, self._inside, self._is_inside = self._inside, "", False
        if calls := self._parse(inside):
            self._space = ""
            return calls
        return self._text(self._opening + inside + closing)

    def _text(self, text: str) -> Sequence[Said]:
        """Less its last white space, which waits for what follows."""
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        return [Text(shown)] if shown else []
