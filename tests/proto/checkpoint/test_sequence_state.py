"""The bytes of a sequence's state are found in transformers' own caches, whose classes may change.

Planted faults seen red: transformers' classes are not looked into; a shared tensor counts twice.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache

from proto.checkpoint.sequence_state import state_bytes

LAYERS, HEADS, TOKENS, WIDTH = 3, 2, 5, 8


def filled() -> DynamicCache:
    cache = DynamicCache()
    for layer in range(LAYERS):
        keys, values = (torch.zeros(1, HEADS, TOKENS, WIDTH) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def test_keys_and_values_of_every_layer_count() -> None:
    assert state_bytes(filled()) == LAYERS * 2 * HEADS * TOKENS * WIDTH * 4


def test_no_cache_is_no_bytes() -> None:
    assert state_bytes(None) == 0


def test_what_is_shared_counts_once() -> None:
    cache = filled()
    assert state_bytes([cache, {"again": cache}]) == state_bytes(cache)
