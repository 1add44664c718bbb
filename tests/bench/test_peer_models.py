"""The formats and the variants that engines are compared in compute what the checkpoint computes.

Planted faults seen red: the first tensor of a record lent as all of them, an expert left out,
another expert's bytes lent, nothing asked of the kernel, gate and up swapped, experts backwards or
in the order of their names' spelling, a moved shard kept.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compute_node.engine.sequence import SequenceState
from expert_store.offline.pack import pack
from tests import checkpoints
from tests.bench.peers.fused import fuse
from tests.bench.peers.mapped_worker import engine, sample
from tests.bench.widen import widen

PROMPT, MORE = list(range(3, 19)), list(range(40, 47))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widened, so a shard a layer."""
    root = tmp_path_factory.mktemp("peers")
    checkpoints.make("qwen3_moe", root / "narrow")
    widen(root / "narrow", root / "wide", 16 * 1024)
    return root / "wide"


@torch.inference_mode()
def expected(folder: Path) -> list[Tensor]:
    """Logits after the prompt and after each token more, by transformers' eager experts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.set_experts_implementation("eager")
    cache, logits = None, []
    for chunk in (PROMPT, *([token] for token in MORE)):
        ids = torch.tensor([chunk])
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits.append(output.logits[:, -1])
        cache = output.past_key_values
    return logits


def test_mapped_experts_give_the_bits_of_eager_ones(checkpoint: Path, tmp_path: Path) -> None:
    pack(checkpoint, tmp_path / "store")
    running = engine(tmp_path / "store")
    sequence = SequenceState("s", list(PROMPT))
    logits = [running.prefill(sequence)]
    for token in MORE:
        sequence.token_ids.append(token)
        logits += running.decode([sequence])
    for ours, theirs in zip(logits, expected(checkpoint), strict=True):
        assert torch.equal(ours, theirs)
    assert len(list(sample(running, list(PROMPT), 4, seed=0))) == 4, "generating counts more"


def test_mapped_experts_are_asked_of_the_kernel_before_they_are_lent(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(checkpoint, tmp_path / "store")
    mapped = engine(tmp_path / "store").cache
    asked: list[str] = []
    monkeypatch.setattr(mapped, "_will_need", lambda key: asked.append(str(key)))
    _, waves = mapped.step(1, [3, 5])
    assert asked == ["L01E003", "L01E005"]
    assert [str(borrowed.key) for wave in waves for borrowed in wave] == asked


def test_a_fused_checkpoint_loads_as_the_one_it_was(checkpoint: Path, tmp_path: Path) -> None:
    before = expected(checkpoint)
    moved = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    fuse(moved, tmp_path / "fused")
    assert not moved.exists(), "it never takes the room of two"
    after = expected(tmp_path / "fused")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_fusing_goes_on_after_an_interruption(checkpoint: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    last = max(moved.glob("*.safetensors"))
    whole = last.read_bytes()
    last.write_bytes(b"torn")
    with pytest.raises(SafetensorError):
        fuse(moved, tmp_path / "fused")
    assert len(list(moved.glob("*.safetensors"))) == 1, "the others are moved"
    last.write_bytes(whole)
    fuse(moved, tmp_path / "fused")
    names = {name for file in tmp_path.glob("fused/*.safetensors") for name in load_file(file)}
    assert "model.layers.0.mlp.experts.down_proj" in names
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
