"""A token that names one expert twice: both choices count, in eager's order, to the last bit.

Planted faults seen red: one choice of the two kept (as a dict by expert does), the two added one
after the other (torch's index_add_ rounds their sum once).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compute_node.engine.sequence import SequenceState
from compute_node.moe.step import Phase
from expert_store.offline.index import index
from expert_store.offline.pack import pack
from tests.checkpoints import ARCHITECTURES, make
from tests.contract.test_exactness import eager_model, engine, prompt, reference

STEPS = 24
HASH_ROUTED = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "hc_mult": 2,
    "num_hidden_layers": 4,
    "sliding_window": 16,
}
WIDE = {
    "hidden_size": 256,
    "moe_intermediate_size": 96,
    "head_dim": 64,
}  # native kernels take these
LAYER, NUM_TOKENS = 1, 3
TWICE = [5, 2, 5, 11], [7, 7, 7, 7], [3, 9, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_hash_routed_layers_are_exact(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers initialises their table of token ids with equal entries."""
    monkeypatch.setitem(ARCHITECTURES, "deepseek_v4", HASH_ROUTED)
    expected = reference({}, "deepseek_v4", dtype, tmp_path)
    index(expected.root, tmp_path / "store")
    with engine(tmp_path / "store", tmp_path) as node:
        sequence = SequenceState("s", prompt())
        logits = [node.prefill(sequence)]
        for _ in range(STEPS - 1):
            sequence.token_ids.append(int(logits[-1].argmax()))
            found, step = node.forward(sequence, sequence.token_ids[-1:], Phase.DECODE)
            logits.append(found)
        assert step.accesses[0].ids.unique().numel() == 1, "else this proves nothing"
    for step, (ours, theirs) in enumerate(zip(logits, expected.logits[:STEPS], strict=True)):
        assert torch.equal(ours, theirs), f"step {step} differs"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen3_moe", tmp_path_factory.mktemp("wide"), torch.bfloat16, **WIDE)


def choices() -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, D]; ids [T, K], all but the last token's name an expert twice; weights [T, K]."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, WIDE["hidden_size"], generator=generator).bfloat16()
    return hidden, torch.tensor(TWICE), torch.rand(NUM_TOKENS, 4, generator=generator)


@pytest.mark.parametrize("weight_format", ["exact", "lossless"])
def test_one_token_and_several_are_exact(
    weight_format: str, checkpoint: Path, tmp_path: Path
) -> None:
    hidden, ids, weights = choices()
    experts = eager_model(checkpoint, torch.bfloat16).model.layers[LAYER].mlp.experts
    parts = [slice(0, 1), slice(1, 2), slice(0, 2), slice(0, 3)]
    with torch.inference_mode():
        expected = [experts(hidden[part], ids[part], weights[part]) for part in parts]
    pack(checkpoint, tmp_path / "store", weight_format=weight_format)
    with engine(tmp_path / "store", tmp_path) as node:
        found = [
            node.forward_layer(LAYER, hidden[part], ids[part], weights[part], Phase.PREFILL)
            for part in parts
        ]
    for part, ours, theirs in zip(parts, found, expected, strict=True):
        assert torch.equal(ours, theirs), f"tokens {part}"


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_low_bit_experts_count_both_choices(
    weight_format: str, checkpoint: Path, tmp_path: Path
) -> None:
    """As one choice with both weights does, but for roundings."""
    hidden, _, weights = choices()
    twice, once = torch.tensor([[5, 2, 5, 11]]), torch.tensor([[5, 2, 0, 11]])
    added = weights[:1].clone()
    added[0, 0], added[0, 2] = weights[0, 0] + weights[0, 2], 0.0
    pack(checkpoint, tmp_path / "store", weight_format=weight_format)
    with engine(tmp_path / "store", tmp_path) as node:
        found = node.forward_layer(LAYER, hidden[:1], twice, weights[:1], Phase.DECODE)
        expected = node.forward_layer(LAYER, hidden[:1], once, added, Phase.DECODE)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
