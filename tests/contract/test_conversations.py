"""Several sequences, and prompts that begin like one before, on every architecture: each gives the
bits it gives alone, from nothing.

Planted faults seen red: state handed out without a copy, windows joined as if they grew, parts cut
otherwise in longer prompts, a portion of a layer's experts left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compute_node.engine.engine import Engine
from compute_node.engine.kept import KeptPrompts
from compute_node.engine.kv_room import KvRoom
from compute_node.engine.seat import Seat
from compute_node.engine.sequence import SequenceState
from expert_store.offline.index import index
from tests.architectures import causal_types, tiny_config
from tests.checkpoints import ARCHITECTURES, make, save
from tests.contract.test_every_architecture import REFUSED
from tests.contract.test_exactness import engine

END = 5  # the token that ends a turn
FIRST = [(7 * n + n * n) % 120 + 6 for n in range(21)] + [END, 9, 8, 7]
SECOND = [*FIRST, *((5 * n + 3) % 120 + 6 for n in range(9)), END, 12, 11, END, 10]
BRANCH = [*FIRST[:22], 40, 41, 42, *FIRST[3:20]]
STEPS = 6


def decoded(node: Engine, sequence: SequenceState, num_steps: int = STEPS) -> list[Tensor]:
    """Logits of each step, greedily."""
    assert sequence.logits is not None
    found = [sequence.logits] if len(sequence.token_ids) == sequence.num_computed else []
    for logits in found:
        sequence.token_ids.append(int(logits.argmax()))
    for _ in range(num_steps):
        found += node.decode([sequence])
        sequence.token_ids.append(int(found[-1].argmax()))
    return found


def answered(node: Engine, prompt: list[int]) -> tuple[list[Tensor], SequenceState]:
    sequence = SequenceState("s", list(prompt))
    node.prefill(sequence)
    return decoded(node, sequence), sequence


def alone(node: Engine, prompt: list[int]) -> list[Tensor]:
    """What a prompt gives where nothing is kept."""
    node.room.kept = KeptPrompts(4)
    return answered(node, prompt)[0]


@pytest.fixture(params=[*ARCHITECTURES, *(one for one in causal_types() if one not in REFUSED)])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    if request.param in ARCHITECTURES:
        root = make(request.param, tmp_path / "checkpoint", torch.bfloat16, seed=3)
    else:
        root = save(tiny_config(request.param), tmp_path / "checkpoint", torch.float32)
    index(root, tmp_path / "store")
    with engine(tmp_path / "store", tmp_path) as found:
        found.room = KvRoom(1 << 30)
        found.parts = replace(found.parts, most=16, least=4, ends=frozenset([END]))
        yield found


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_is_kept_of_a_prompt_gives_the_bits_of_computing_it(node: Engine) -> None:
    expected = [alone(node, prompt) for prompt in (SECOND, BRANCH, FIRST)]
    node.room.kept = KeptPrompts(4)
    reused = []
    for prompt, bits in zip((FIRST, SECOND, BRANCH, FIRST), (expected[2], *expected), strict=True):
        found, sequence = answered(node, prompt)
        assert equal(found, bits)
        reused.append(sequence.num_reused)
    assert node.reuse == "on"
    assert reused[0] == 0 and reused[1] == reused[3] == 22 and reused[2] in (16, 22), reused


def test_sequences_that_take_turns_give_the_bits_they_give_alone(node: Engine) -> None:
    expected = [alone(node, prompt) for prompt in (FIRST, BRANCH)]
    node.room.kept = KeptPrompts(4)
    one, two = SequenceState("one", list(FIRST)), SequenceState("two", list(BRANCH))
    node.prefill(one)
    found = decoded(node, one, 0)

    def give_way() -> None:
        """A token of the first, between two portions of the second's prompt."""
        if len(found) <= STEPS:
            found.extend(decoded(node, one, 1))

    seat = Seat(others_wait=lambda: True, give_way=give_way, num_portions=lambda: 3)
    for _ in node.prefill_parts(two, seat):
        pass
    others = decoded(node, two, 0)
    for _ in range(STEPS):
        others += decoded(node, two, 1)
        found += decoded(node, one, 1)
    assert equal(found[: STEPS + 1], expected[0]) and equal(others, expected[1])
