"""An answer under way: what the node says, taken apart by the model's format."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from compute_node.client.async_client import AsyncGeneration
from compute_node.client.result import Piece, Result
from compute_node.gateway.formats.choose import Family
from compute_node.gateway.formats.said import AnswerFormat, Call, Said, Text
from compute_node.gateway.formats.scan import Scan
from compute_node.gateway.held import Held
from compute_node.gateway.node import Node
from compute_node.gateway.system_role import has_system, merged
from proto import errors


@dataclass(frozen=True)
class Asked:
    """What a client wants of the node, whatever interface it came by.

    prompt, options: as the node's client takes them
    held: what the answer is held to; None: to nothing
    """

    prompt: Any
    options: Mapping[str, Any]
    family: Family
    held: Held | None = None


@dataclass(frozen=True)
class Step:
    """What one token brought. piece: None: what was held back to the end"""

    said: Sequence[Said]
    piece: Piece | None = None

    @property
    def scored(self) -> Piece | None:
        """The piece, where log probabilities were asked for."""
        return self.piece if self.piece is not None and self.piece.drawn is not None else None


@dataclass
class Answer:
    """steps can be read once; result is there at their end."""

    generation: AsyncGeneration
    family: Family
    end_texts: tuple[str, ...]
    num_calls: int = 0
    _ahead: list[Step] = field(default_factory=list)
    _stream: Any = None

    async def begin(self, node: Node) -> None:
        """Wait for the first token: what refuses a request refuses it before a status is sent."""
        self._stream = self._steps(node)
        first = await anext(self._stream, None)
        self._ahead = [first] if first is not None else []

    async def steps(self) -> AsyncIterator[Step]:
        """Raises what the node ends with. Leaving early ends the generation."""
        async with aclosing(self._stream):
            for step in self._ahead:
                yield step
            async for step in self._stream:
                yield step

    async def aclose(self) -> None:
        """Nobody reads on: the node stops within a layer."""
        self.generation.cancel()
        if self._stream is not None:
            await self._stream.aclose()

    @property
    def result(self) -> Result:
        return self.generation.whole()

    async def _steps(self, node: Node) -> AsyncIterator[Step]:
        spelling = _Spelling(self.family, self.end_texts)
        try:
            async with node.awaited():
                async for piece in self.generation:
                    yield self._counted(spelling.read(piece.text, self.generation), piece)
            yield self._counted(spelling.end(), None)
        finally:
            self.generation.cancel()

    def _counted(self, said: Sequence[Said], piece: Piece | None) -> Step:
        self.num_calls += sum(isinstance(one, Call) for one in said)
        return Step(said, piece)


class _Spelling:
    """Takes the text apart, up to a special token that ends it."""

    def __init__(self, family: Family, end_texts: tuple[str, ...]) -> None:
        self._family = family
        self._format: AnswerFormat | None = None
        self._ends = end_texts if family.shows_special_tokens else ()
        self._scan, self._is_ended = Scan(), False

    def read(self, text: str, generation: AsyncGeneration) -> Sequence[Said]:
        if self._format is None:
            self._format = self._family.new_format(generation.prompt_end)
        return self._format.feed(self._less_end(text))

    def end(self) -> Sequence[Said]:
        if self._format is None:
            return []
        left = "" if self._is_ended else self._scan.rest()
        return [*self._format.feed(left), *self._format.end()]

    def _less_end(self, text: str) -> str:
        if not self._ends or self._is_ended:
            return "" if self._is_ended else text
        self._scan.add(text)
        before, marker = self._scan.up_to(*self._ends)
        self._is_ended = bool(marker)
        return before


async def begin(node: Node, asked: Asked, client: str) -> Answer:
    """An answer whose first token has come. A template that refuses system messages gets them
    within the user's.

    Raises what the node refuses.
    """
    try:
        return await _begin(node, asked, client)
    except errors.ChatRefused:
        if not has_system(asked.prompt):
            raise
        return await _begin(node, replace(asked, prompt=merged(asked.prompt)), client)


async def _begin(node: Node, asked: Asked, client: str) -> Answer:
    asked.family.check()
    description = await node.describe()
    held = asked.held
    generation = node.client.generate(
        asked.prompt,
        client=client,
        skip_special_tokens=not asked.family.shows_special_tokens,
        grammar=held.grammar(asked.family, description) if held is not None else None,
        **asked.options,
    )
    answer = Answer(generation, asked.family, description.end_texts)
    try:
        await answer.begin(node)
    except BaseException as error:
        await answer.aclose()
        if held is not None and isinstance(error, errors.GrammarRefused):
            raise held.refused(error) from None
        raise
    return answer


def text_of(said: Sequence[Said], kind: type[Text] | type[Any] = Text) -> str:
    return "".join(one.text for one in said if isinstance(one, kind))
