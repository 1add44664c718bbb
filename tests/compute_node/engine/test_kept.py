"""What is kept of prompts, under a budget.

Planted faults seen red: state without its windows handed out, a part given up that others follow,
state of another route handed out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from compute_node.engine.kept import KeptPrompts
from compute_node.engine.kv_room import KvRoom
from compute_node.engine.prompt_parts import PromptParts
from compute_node.engine.saved_state import SavedPart

ONE, TWO = list(range(12)), [*range(8), 50, 51, 52, 53]
CUTS = [4, 8, 12]
BYTES = 2 * 2 * 4  # of a token


def part_of(num_tokens: int, *, windows: bool = False) -> SavedPart:
    cache: Any = DynamicCache()
    if windows:
        cache.layers.append(DynamicSlidingWindowLayer(4))
    for number in range(1 + windows):
        keys = torch.zeros(1, 1, num_tokens, 2)
        cache.update(keys, keys, number)
    return SavedPart.of(cache, num_tokens)


def keep(kept: KeptPrompts, token_ids: list[int], route: str = "", **how: bool) -> None:
    for number in range(1, len(CUTS) + 1):
        kept.keep(token_ids, CUTS[:number], route, part_of(4, **how))


def test_prompts_that_begin_alike_share_what_is_kept() -> None:
    kept = KeptPrompts(0)
    keep(kept, ONE)
    keep(kept, TWO)
    assert kept.num_tokens == 16
    assert kept.longest([*ONE, 9], CUTS, "").num_tokens == 12
    assert kept.longest([*TWO, 9], CUTS, "").num_tokens == 12
    assert kept.longest([*ONE[:8], 99, 99, 99, 99, 9], CUTS, "").num_tokens == 8
    assert (kept.hits, kept.tokens_saved) == (3, 32)


def test_state_of_another_route_is_not_used() -> None:
    kept = KeptPrompts(0)
    keep(kept, ONE, "prior .5")
    assert kept.longest(ONE, CUTS[:2], "").num_tokens == 0
    assert kept.longest(ONE, CUTS[:2], "prior .5").num_tokens == 8


def test_what_was_used_least_recently_goes_first_but_no_part_that_others_follow() -> None:
    room = KvRoom(24 * BYTES, BYTES, 0, 2)
    keep(room.kept, ONE)
    assert room.reserve(16) and room.kept.longest([*ONE, 9], CUTS, "").num_tokens == 8
    room.free(16)
    keep(room.kept, ONE)
    keep(room.kept, TWO)
    room.kept.longest([*ONE, 9], CUTS, "")
    assert room.reserve(12)
    assert room.kept.num_tokens == 12 and room.kept.longest([*ONE, 9], CUTS, "").num_tokens == 12
    assert not room.reserve(13)
    assert room.reserve(12) and room.kept.num_tokens == 0
    assert not room.reserve(1)
    room.free(12)
    assert room.reserve(1)


def test_a_prompt_goes_on_only_where_windows_are_kept() -> None:
    kept = KeptPrompts(1)
    keep(kept, ONE, windows=True)
    assert kept.longest([*ONE, 9], CUTS, "").num_tokens == 12
    assert kept.longest([*ONE[:8], 99, 99, 99, 99], CUTS[:2], "").num_tokens == 0


@pytest.mark.parametrize(
    ("token_ids", "cuts"),
    [
        ([1] * 20, [8, 16]),
        ([1, 0, 1, 1, 0, *[1] * 9], [5, 13]),
        ([0] * 7, [3, 6]),
        ([1, 1], []),
    ],
)
def test_longer_prompts_are_cut_where_shorter_ones_are(
    token_ids: list[int], cuts: list[int]
) -> None:
    parts = PromptParts(most=8, least=3, ends=frozenset([0]))
    assert list(parts.cuts(token_ids)) == cuts
    for length in range(len(token_ids)):
        assert list(parts.cuts(token_ids[:length])) == [cut for cut in cuts if cut <= length]
