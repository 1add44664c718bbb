"""gpt-oss as its vendor ships it: mxfp4 blocks and scales become what transformers makes of them.

Planted faults seen red: halves of a byte swapped, exponents one off, a config that still says mxfp4
or no dtype, an index of blocks.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from expert_store.offline.formats import mxfp4
from expert_store.offline.index import index
from expert_store.offline.pack import pack
from proto import errors
from tests.checkpoints import make
from tests.contract.test_exactness import align, decode_eagerly, engine
from tests.contract.test_formats import STEPS, check_same, run, stored
from tests.matrices import dequantised

INNER = 96


def make_vendor(root: Path) -> Path:
    """A tiny random checkpoint with the names, shapes and config of openai/gpt-oss."""
    make("gpt_oss", root, torch.bfloat16, intermediate_size=INNER)
    weights = load_file(root / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj") and "experts" in name]:
        num_experts, num_inputs, num_outputs = weights.pop(name).shape  # [E, K, N]
        shape = (num_experts, num_outputs, num_inputs // 32)
        weights[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.randint(120, 126, shape, dtype=torch.uint8)
    save_file(weights, root / "model.safetensors", {"format": "pt"})
    config = json.loads((root / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    del config["dtype"]  # the vendor's says nothing
    (root / "config.json").write_text(json.dumps(config))
    return root


@pytest.fixture(scope="module")
def vendor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vendor(tmp_path_factory.mktemp("vendor") / "gpt-oss-tiny")


@pytest.mark.parametrize("scale", [0, 1, 100, 127, 140, 250])
def test_every_code_means_what_transformers_makes_of_it(scale: int) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 4, 4, 16)
    scales = torch.full((1, 4, 4), scale, dtype=torch.uint8)
    ours = mxfp4.dequantise(blocks.flatten(), scales.flatten(), 128)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)[0].T
    assert torch.equal(ours.view(torch.int16), theirs.contiguous().view(torch.int16))


def test_bf16_store_equals_transformers_dequantised(vendor: Path, tmp_path: Path) -> None:
    """Every weight and every logit; not lossy, and nothing of the quantisation left in its
    config.
    """
    manifest = pack(vendor, tmp_path / "store", weight_format="bf16")
    assert not manifest.spec.weight_format.lossy
    model = AutoModelForCausalLM.from_pretrained(
        vendor, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    ).eval()
    model.set_experts_implementation("eager")
    align(model)
    for layer, module in enumerate(m for m in model.modules() if hasattr(m, "is_transposed")):
        for key, tensors in stored(tmp_path / "store").items():
            if key.layer == layer:
                for name, parameter in module.named_parameters(recurse=False):
                    assert torch.equal(tensors[name], parameter[key.expert]), f"{key} {name}"
    with engine(tmp_path / "store", tmp_path) as node:
        check_same(run(node), decode_eagerly(model, STEPS))
    config = json.loads((tmp_path / "store" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"


def test_int4_store_is_quantised_from_the_blocks(vendor: Path, tmp_path: Path) -> None:
    exact = pack(vendor, tmp_path / "bf16", weight_format="bf16")
    manifest = pack(vendor, tmp_path / "int4", weight_format="int4")
    assert manifest.spec.weight_format.lossy
    assert manifest.expert_bytes_total < exact.expert_bytes_total / 2.5
    packed = stored(tmp_path / "int4")
    for key, tensors in stored(tmp_path / "bf16").items():
        for name in ("gate_up_proj", "down_proj"):
            weight = tensors[name].T  # [N, K]
            found = dequantised(packed[key], name, (weight.shape[0], weight.shape[1]))
            assert (found - weight).norm() < 0.15 * weight.norm(), f"{key} {name}"
        assert torch.equal(packed[key]["down_proj_bias"], tensors["down_proj_bias"])
    with engine(tmp_path / "int4", tmp_path) as node:
        _, tokens = run(node)
    assert len(set(tokens)) > 4


def test_in_place_and_exact_are_refused_with_the_remedy(vendor: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointUnsupported, match=r"flashmoe pack .* --format bf16"):
        index(vendor, tmp_path / "store")
    with pytest.raises(errors.CheckpointUnsupported, match=r"pack it with --format bf16"):
        pack(vendor, tmp_path / "store")
    assert not (tmp_path / "store").exists()
