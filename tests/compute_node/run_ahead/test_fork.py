"""A fork shares what is not written in place, clones what is, and holds one layer's memory.

Planted faults seen red: states of convolutions shared, a layer kept after it was left.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from compute_node.run_ahead.fork import Fork, Geometry, can_fork


def attention(num_tokens: int) -> DynamicLayer:
    layer = DynamicLayer()
    layer.update(*torch.randn(2, 1, 2, num_tokens, 4))
    return layer


def recurrence() -> LinearAttentionLayer:
    layer = LinearAttentionLayer()
    layer.update_conv_state(torch.randn(1, 8, 4))
    layer.update_recurrent_state(torch.randn(1, 2, 4, 4))
    return layer


def states() -> DynamicCache:
    """Of five tokens, in two kinds of layers."""
    cache = DynamicCache()
    cache.layers = [attention(5), recurrence(), attention(5)]
    return cache


def test_growing_a_fork_leaves_the_state() -> None:
    true = states()
    fork = Fork(true, Geometry(true))
    keys = true.layers[0].keys
    fork.enter(0)
    assert fork.state.layers[0].keys is keys, "shared"
    fork.state.update(*torch.randn(2, 1, 2, 1, 4), 0)
    assert true.layers[0].keys is keys and true.get_seq_length(0) == 5
    assert fork.state.get_seq_length(0) == 6


def test_what_is_written_in_place_is_cloned() -> None:
    true = states()
    before = [state.clone() for state in true.layers[1].recurrent_states.values()]
    fork = Fork(true, Geometry(true))
    fork.enter(1)
    fork.state.layers[1].update_recurrent_state(torch.zeros(1, 2, 4, 4))
    after = true.layers[1].recurrent_states.values()
    assert all(map(torch.equal, before, after))


def test_lengths_are_those_before_the_token() -> None:
    """The true pass has grown its first layer since."""
    true = states()
    geometry = Geometry(true)
    true.update(*torch.randn(2, 1, 2, 1, 4), 0)
    fork = Fork(true, geometry)
    assert [fork.state.get_seq_length(number) for number in (0, 2)] == [5, 5]
    fork.skip(0)
    assert fork.state.get_seq_length(0) == 6


def test_a_layer_that_was_left_holds_no_memory() -> None:
    true = states()
    fork = Fork(true, Geometry(true))
    fork.enter(0)
    fork.state.update(*torch.randn(2, 1, 2, 1, 4), 0)
    fork.leave(0)
    keys = fork.state.layers[0].keys
    assert keys.shape[-2] == 6 and keys.untyped_storage().nbytes() == keys.element_size()


def test_only_layers_can_be_forked() -> None:
    assert can_fork(states())
    assert not can_fork(None)
    assert not can_fork((torch.zeros(1),))
