"""State of prompts that were computed, kept for prompts that begin alike."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from compute_node.engine.saved_state import SavedPart
from proto.stats import counter, gauge

Part = tuple[str, tuple[int, ...]]
"""The route that a prompt goes by, and token ids. State of another route is another part."""


@dataclass(eq=False)
class _Place:
    """Where parts begin: at the end of one, or of none."""

    children: dict[Part, _Node] = field(default_factory=dict)


@dataclass(eq=False)
class _Node(_Place):
    """One part of a prompt, after those before it. Prompts that begin alike share it."""

    part: Part = field(kw_only=True)
    saved: SavedPart = field(kw_only=True)
    parent: _Place = field(kw_only=True)

    @property
    def num_tokens(self) -> int:
        return len(self.part[1])


@dataclass(eq=False)
class KeptPrompts:
    """A tree of parts. The part that was used least recently, and that no other follows, goes
    first. One thread.

    most_states: parts that keep what does not grow by the token (recurrent states, windows), where
                 a model has it: a prompt can go on after such a part only
    """

    most_states: int = 4
    hits: int = counter(
        "flashmoe_node_kept_prompts", "Prompts that began like one kept", key="kept_hits"
    )
    tokens_saved: int = counter(
        "flashmoe_node_kept_tokens_saved", "Prompt tokens not computed again", key="tokens_saved"
    )
    num_tokens: int = gauge(
        "flashmoe_node_kept_tokens", "Prompt tokens whose state is kept", key="kept_tokens", start=0
    )
    num_bytes: int = gauge(
        "flashmoe_node_state_bytes",
        "Memory for the state of sequences",
        key="kept_bytes",
        start=0,
        of="kept",
    )
    _root: _Place = field(default_factory=_Place)
    _nodes: dict[_Node, None] = field(default_factory=dict)  # the least recently used first
    _states: dict[_Node, None] = field(default_factory=dict)  # with a rest that takes memory

    def longest(self, token_ids: Sequence[int], cuts: Sequence[int], route: str) -> Found:
        """What is kept of the prompt's beginning, up to one of its cuts.

        route: that the prompt goes by; state of another is never used
        """
        path, best = list[_Node](), 0
        for part in _parts(token_ids, cuts, route):
            node = (path[-1] if path else self._root).children.get(part)
            if node is None:
                break
            path.append(node)
            self._touch(node)
            if node.saved.rest is not None:
                best = len(path)
        path = path[:best]
        found = Found([node.saved for node in path], sum(node.num_tokens for node in path))
        self.hits += bool(path)
        self.tokens_saved += found.num_tokens
        return found

    def keep(
        self, token_ids: Sequence[int], cuts: Sequence[int], route: str, saved: SavedPart
    ) -> None:
        """The part that ends at the last of `cuts`. Those before it are kept already; else nothing
        happens: they were given up meanwhile.
        """
        *before, part = _parts(token_ids, cuts, route)
        place = self._root
        for earlier in before:
            if (found := place.children.get(earlier)) is None:
                return
            place = found
        if (node := place.children.get(part)) is None:
            node = place.children[part] = _Node(part=part, saved=saved, parent=place)
            self.num_tokens += node.num_tokens
            self.num_bytes += saved.num_bytes
        elif node.saved.rest is None:
            self._replace(node, saved)
        self._touch(node)
        self._limit_states()

    def give_up_one(self) -> None:
        """Some is kept."""
        node = next(one for one in self._nodes if not one.children)
        del self._nodes[node]
        self._states.pop(node, None)
        self.num_tokens -= node.num_tokens
        self.num_bytes -= node.saved.num_bytes
        del node.parent.children[node.part]

    def _touch(self, node: _Node) -> None:
        self._nodes.pop(node, None)
        self._nodes[node] = None
        if node.saved.rest_bytes:
            self._states.pop(node, None)
            self._states[node] = None

    def _limit_states(self) -> None:
        while len(self._states) > self.most_states:
            oldest = next(iter(self._states))
            del self._states[oldest]
            self._replace(oldest, oldest.saved.without_rest())

    def _replace(self, node: _Node, saved: SavedPart) -> None:
        self.num_bytes += saved.num_bytes - node.saved.num_bytes
        node.saved = saved


@dataclass(frozen=True)
class Found:
    """parts: of a prompt, from its beginning on, num_tokens long together"""

    parts: list[SavedPart]
    num_tokens: int


def _parts(token_ids: Sequence[int], cuts: Sequence[int], route: str) -> Iterator[Part]:
    for start, end in itertools.pairwise((0, *cuts)):
        yield route, tuple(token_ids[start:end])
