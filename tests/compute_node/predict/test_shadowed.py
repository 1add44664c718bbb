"""What a main node makes of a shadow's names: right when the token is, and read when it is near.

Planted faults seen red: another token's names taken, the next token's read too early, what was told
said twice, names forgotten once they were read, late ones not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from compute_node.boxes.shadow_link import Name, State
from compute_node.predict.named_reads import NamedReads
from compute_node.predict.shadowed import Shadowed
from proto.expert import ExpertKey

LAYERS = (1, 3, 4)


class Elsewhere:
    def __init__(self) -> None:
        self.prepared: list[tuple[int, list[int]]] = []

    def prepare(self, layer: int, experts: Sequence[int]) -> None:
        self.prepared.append((layer, list(experts)))


class Reads:
    """What is read, with its distance, and what boxes were asked for."""

    def __init__(self) -> None:
        self.cache, self.elsewhere = self, Elsewhere()
        self.read_now: list[tuple[int, int, list[int], bool]] = []

    def read(
        self, layer: int, distance: int, chosen: Sequence[ExpertKey], prepares: bool = True
    ) -> None:
        self.read_now.append((layer, distance, [key.expert for key in chosen], prepares))


class Link:
    is_up = True

    def __init__(self) -> None:
        self.said: list[tuple[str, list[int]]] = []

    def num_heard(self, sequence: str) -> int:
        return len(self.said)

    def follow(
        self,
        sequence: str,
        token_ids: Sequence[int],
        states: Sequence[State] = (),
        drawing: object = None,
    ) -> None:
        self.said.append((sequence, list(token_ids)))

    def forget(self, sequence: str) -> None:
        self.said.append((sequence, []))


@pytest.fixture
def reads() -> Reads:
    return Reads()


@pytest.fixture
def shadowed(reads: Reads) -> Shadowed:
    found = Shadowed(LAYERS, cast(NamedReads, reads))
    found.link = cast(Any, Link())
    return found


def name(position: int, token_id: int, layer: int, *experts: int, of: str = "a") -> Name:
    return Name(of, position, token_id, layer, experts)


def test_names_of_this_token_are_prepared_at_once_and_read_at_the_next_layer(
    shadowed: Shadowed, reads: Reads
) -> None:
    shadowed.follow("a", [7, 8], None)
    shadowed.hear(name(1, 8, 3, 0, 5))
    assert reads.elsewhere.prepared == [(3, [0, 5])] and not reads.read_now
    shadowed.reached(1, [2])
    assert reads.read_now == [(3, 1, [0, 5], False)]
    shadowed.reached(3, [0, 6])
    assert (shadowed.num_named, shadowed.num_unnamed, shadowed.num_unheard) == (1, 1, 1)
    assert shadowed.recall == 0.5


def test_names_of_the_next_token_wait_until_this_one_is_past_the_layer(
    shadowed: Shadowed, reads: Reads
) -> None:
    shadowed.follow("a", [7, 8], None)
    shadowed.hear(name(2, 9, 1, 4))
    shadowed.reached(1, [2])
    assert not reads.read_now and not reads.elsewhere.prepared
    shadowed.reached(3, [2])
    assert reads.read_now == [(1, 2, [4], True)]
    shadowed.follow("a", [7, 8, 9], None)
    shadowed.reached(1, [4])
    assert shadowed.num_named == 1


def test_names_of_another_token_or_sequence_count_for_nothing(
    shadowed: Shadowed, reads: Reads
) -> None:
    shadowed.follow("a", [7, 8], None)
    shadowed.hear(name(2, 9, 1, 4))
    shadowed.hear(name(2, 9, 3, 4))
    shadowed.reached(4, [2])
    shadowed.follow("a", [7, 8, 10], None)  # another token than the shadow thought
    shadowed.hear(name(2, 9, 4, 4))
    shadowed.hear(name(2, 10, 4, 5, of="b"))
    for layer in LAYERS:
        shadowed.reached(layer, [4])
    assert (shadowed.num_named, shadowed.num_unheard) == (0, 4)


def test_what_is_named_late_is_counted(shadowed: Shadowed, reads: Reads) -> None:
    shadowed.follow("a", [7, 8], None)
    shadowed.reached(1, [2, 3])
    shadowed.hear(name(1, 8, 1, 2, 9))
    assert (shadowed.num_named_late, shadowed.num_unnamed, shadowed.num_unheard) == (1, 1, 2)
    assert not reads.read_now and not reads.elsewhere.prepared


def test_a_sequence_that_ended_is_forgotten(shadowed: Shadowed, reads: Reads) -> None:
    shadowed.begin("a", [7])
    shadowed.follow("a", [7, 8], None)
    shadowed.hear(name(1, 8, 4, 1))
    shadowed.end("a")
    shadowed.hear(name(1, 8, 3, 1))
    shadowed.follow("b", [7, 8], None)
    shadowed.reached(4, [1])
    assert shadowed.num_unheard == 1


def test_the_prompt_is_said_at_once_and_names_of_the_first_token_are_kept(
    shadowed: Shadowed,
) -> None:
    """Planted faults seen red: the prompt not said, names before the first step forgotten."""
    shadowed.begin("a", [7, 8])
    assert shadowed.link.said == [("a", [7, 8])]  # type: ignore[attr-defined]
    shadowed.hear(name(1, 8, 1, 3))
    shadowed.hear(name(2, 9, 1, 4))
    shadowed.follow("a", [7, 8, 9], None)
    shadowed.reached(1, [4])
    assert (shadowed.num_named, shadowed.num_unnamed, shadowed.num_unheard) == (1, 0, 0)
