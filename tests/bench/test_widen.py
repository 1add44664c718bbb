"""A widened checkpoint is another file and the same function.

Planted faults seen red: padding with random output weights, with zeros of one sign, with zero input
weights, real units moved behind the padding, the old size in config.json, offsets that all begin at
zero, no look at the disk, a record smaller than the expert, a checkpoint without experts taken;
copies numbered beside their originals, with the same router rows, no original row, the old number
of experts in config.json.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests import checkpoints
from tests.bench import widen

D, F, WIDE, E = 64, 32, 256, 16
RECORD_BYTES = 3 * D * WIDE * 2
EXPERT = "model.layers.1.mlp.experts.3."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and itself widened."""
    root = tmp_path_factory.mktemp("widen")
    source = checkpoints.make("qwen3_moe", root / "narrow")
    (source / "tokenizer.json").write_text("{}")
    widen.widen(source, root / "wide", RECORD_BYTES)
    return source, root / "wide"


def tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


@torch.inference_mode()
def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()
    output: Tensor = model(torch.arange(3, 35)[None]).logits[0]
    return output


def test_computes_the_same(folders: tuple[Path, Path]) -> None:
    narrow, wide = (logits(folder) for folder in folders)
    assert torch.equal(narrow.argmax(-1), wide.argmax(-1))
    torch.testing.assert_close(narrow, wide, rtol=1e-4, atol=1e-4)


def test_keeps_the_weights_and_pads_with_what_changes_nothing(folders: tuple[Path, Path]) -> None:
    narrow, wide = (tensors(folder) for folder in folders)
    assert narrow.keys() == wide.keys()
    down = wide[f"{EXPERT}down_proj.weight"]
    assert down.shape == (D, WIDE)
    assert torch.equal(down[:, :F], narrow[f"{EXPERT}down_proj.weight"])
    assert not down[:, F:].any(), "padding units give nothing"
    assert 0.4 < torch.signbit(down[:, F:]).float().mean() < 0.6, "no block is all zeros"
    for name in ("gate_proj", "up_proj"):
        weight, old = wide[f"{EXPERT}{name}.weight"], narrow[f"{EXPERT}{name}.weight"]
        assert torch.equal(weight[:F], old)
        assert weight[F:].unique().numel() > 1000, "nothing to compress"
        assert weight[F:].float().std() == pytest.approx(float(old.float().std()), rel=0.05)
    others = [name for name in narrow if "experts" not in name]
    assert all(torch.equal(narrow[name], wide[name]) for name in others)


def test_is_a_checkpoint_of_records_as_large_as_asked(folders: tuple[Path, Path]) -> None:
    _, wide = folders
    index = json.loads((wide / "model.safetensors.index.json").read_text())
    found = tensors(wide)
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert sum(t.nbytes for name, t in found.items() if EXPERT in name) == RECORD_BYTES
    assert json.loads((wide / "config.json").read_text())["moe_intermediate_size"] == WIDE
    assert (wide / "tokenizer.json").exists()
    assert len(list(wide.glob("*.safetensors"))) == 3, "a shard a layer, and the rest"


def test_copies_compute_as_their_originals_and_compete_with_them(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    widen.widen(folders[0], tmp_path / "out", RECORD_BYTES, copies=3)
    old, new = tensors(folders[0]), tensors(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_local_experts"] == 3 * E
    for number in (3, 3 + E, 3 + 2 * E):
        weight = new[f"model.layers.1.mlp.experts.{number}.up_proj.weight"]
        assert torch.equal(weight[:F], old[f"{EXPERT}up_proj.weight"])
    router, first = (found["model.layers.1.mlp.gate.weight"].float() for found in (new, old))
    assert router.shape == (3 * E, D)
    assert torch.equal(router[:E], first)
    for copy in (1, 2):
        noise = router[copy * E : (copy + 1) * E] - first
        assert noise.std() == pytest.approx(float(first.std()), rel=0.1)
    assert logits(tmp_path / "out").shape == (32, 128), "transformers takes it"


def test_a_disk_too_small_is_one_sentence(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    arguments = ["widen", str(folders[0]), str(tmp_path / "wide"), "--record-mib", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match=r"^widen: the widened checkpoint needs .* make room"):
        widen.main()
    assert not (tmp_path / "wide").exists()


def test_an_expert_is_not_made_smaller(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a larger record"):
        widen.widen(folders[0], tmp_path / "out", 3 * D * (F - 1) * 2)


def test_only_experts_a_tensor_each_are_widened(tmp_path: Path) -> None:
    source = checkpoints.make("granitemoe", tmp_path / "fused", moe_intermediate_size=48)
    with pytest.raises(ValueError, match="no experts"):
        widen.widen(source, tmp_path / "out", RECORD_BYTES)
