"""What a model says, taken apart: text, thoughts, calls of tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Text:
    """Part of the answer itself."""

    text: str


@dataclass(frozen=True)
class Thought:
    """Part of what it thinks before it answers."""

    text: str


@dataclass(frozen=True)
class Call:
    """One whole call of a tool. arguments: JSON, an object"""

    name: str
    arguments: str


Said = Text | Thought | Call


class AnswerFormat(Protocol):
    """How one family of models writes an answer. Nothing that was said is ever lost: what is no
    call after all comes out as text.
    """

    def feed(self, text: str) -> Sequence[Said]:
        """What is complete now. Changes what is held back."""
        ...

    def end(self) -> Sequence[Said]:
        """What was held back, after the last text."""
        ...
