"""Text that comes in pieces, read up to markers that may be cut in two."""

from __future__ import annotations


class Scan:
    """held: what was added and not read yet"""

    def __init__(self) -> None:
        self.held = ""

    def add(self, text: str) -> None:
        self.held += text

    def up_to(self, *markers: str) -> tuple[str, str]:
        """The text before the first marker, and the marker; the marker is read, too.

        Without one: the text that cannot be part of one, and "".
        """
        places = [(at, marker) for marker in markers if (at := self.held.find(marker)) >= 0]
        if places:
            at, marker = min(places, key=lambda place: (place[0], -len(place[1])))
            before, self.held = self.held[:at], self.held[at + len(marker) :]
            return before, marker
        split = len(self.held) - max((_overlap(self.held, one) for one in markers), default=0)
        before, self.held = self.held[:split], self.held[split:]
        return before, ""

    def rest(self) -> str:
        """All that is held."""
        text, self.held = self.held, ""
        return text


def _overlap(text: str, marker: str) -> int:
    """The longest end of `text` that begins `marker`."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0
