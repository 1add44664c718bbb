"""Every causal architecture of the installed transformers with experts on its experts interface:
bit-identical to its eager experts, or refused at index by name.

Planted faults seen red: the node made position tables on two devices (gemma4, phimoe's longrope),
wanted a router with one weight row an expert beside the experts (afmoe, hunyuan_v1_moe, inkling,
zaya), took a layer's weights that its model does not have, took float32 where the config names no
dtype.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compute_node.engine.sequence import SequenceState
from compute_node.moe.step import Phase
from compute_node.run_ahead.run_ahead import ON
from expert_store.offline.index import index
from expert_store.offline.pack import pack
from proto import errors
from tests.architectures import causal_types, tiny_config
from tests.checkpoints import make, save
from tests.contract.test_exactness import decode_eagerly, eager_model, engine, prompt

STEPS = 24
REFUSED = {"inkling2_text": r"Interleave.*save_original_format=False"}


def check_exact(root: Path, store_dir: Path, dtype: torch.dtype, scratch: Path) -> None:
    """Few slots: a layer's experts fit with two to spare. Every layer is run ahead of."""
    expected, tokens = decode_eagerly(eager_model(root, dtype), STEPS)
    with engine(store_dir, scratch, spare=2, run_ahead="always") as node:
        sequence = SequenceState("s", prompt())
        logits = [node.prefill(sequence)]
        sequence.token_ids.append(int(logits[-1].argmax()))
        for _ in range(STEPS - 1):
            logits += node.decode([sequence])
            sequence.token_ids.append(int(logits[-1].argmax()))
    for step, (ours, theirs) in enumerate(zip(logits, expected, strict=True)):
        assert torch.equal(ours, theirs), f"step {step} differs"
    assert sequence.token_ids == tokens
    ahead = node.run_ahead
    assert ahead is not None and ahead.status == ON
    assert ahead.num_starts >= STEPS
    assert ahead.num_layers > 0 or len(ahead.moe_layers) == 1


def test_the_list_is_computed() -> None:
    types = causal_types()
    assert len(types) > 50
    assert {"mixtral", "gpt_oss", "deepseek_v4", "gemma4"} < set(types)
    assert set(REFUSED) < set(types)


@pytest.mark.parametrize("model_type", causal_types())
def test_exact_or_refused_by_name(model_type: str, tmp_path: Path) -> None:
    root = save(tiny_config(model_type), tmp_path / "checkpoint", torch.float32)
    if model_type in REFUSED:
        for maker in (index, pack):
            with pytest.raises(errors.CheckpointUnsupported, match=REFUSED[model_type]):
                maker(root, tmp_path / "store")
        return
    index(root, tmp_path / "store")
    check_exact(root, tmp_path / "store", torch.float32, tmp_path)


def test_the_remedy_of_a_refused_conversion_works(tmp_path: Path) -> None:
    config = tiny_config("inkling2_text")
    root = save(config, tmp_path / "checkpoint", torch.float32, save_original_format=False)
    index(root, tmp_path / "store")
    check_exact(root, tmp_path / "store", torch.float32, tmp_path)


_FACTORS = {"short_factor": [1.0, 1.5] * 4, "long_factor": [2.0, 3.0] * 4}
_ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
    "longrope": {"original_max_position_embeddings": 40, **_FACTORS},
    "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 32},
    "proportional": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("rope_type", _ROPES)
def test_positions_of_every_kind_are_exact(rope_type: str, tmp_path: Path) -> None:
    """40 positions are passed on the way, where longrope changes its table."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0} | _ROPES[rope_type]
    trained = {"max_position_embeddings": 40} if rope_type == "dynamic" else {}
    config = tiny_config("qwen3_moe", rope_parameters=rope, **trained)
    root = save(config, tmp_path / "checkpoint", torch.float32)
    index(root, tmp_path / "store")
    check_exact(root, tmp_path / "store", torch.float32, tmp_path)


def test_phimoe_with_longrope_is_exact(tmp_path: Path) -> None:
    """As Phi-3.5-MoE has it."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 40,
        "short_mscale": 1.2,
        "long_mscale": 1.3,
        **_FACTORS,
    }
    root = make("phimoe", tmp_path / "checkpoint", torch.float32, rope_parameters=rope)
    index(root, tmp_path / "store")
    check_exact(root, tmp_path / "store", torch.float32, tmp_path)


def test_a_list_of_experts_a_token_is_read_from_the_model(tmp_path: Path) -> None:
    """Hunyuan-A13B says `moe_topk: [8, 8, ...]`."""
    config = tiny_config("hunyuan_v1_moe", moe_topk=[4] * 4)
    root = save(config, tmp_path / "checkpoint", torch.float32)
    assert index(root, tmp_path / "store").spec.top_k == 4
    check_exact(root, tmp_path / "store", torch.float32, tmp_path)


def test_layers_with_different_numbers_of_experts_a_token_are_refused(tmp_path: Path) -> None:
    config = tiny_config("hunyuan_v1_moe", moe_topk=[4, 2, 4, 4])
    root = save(config, tmp_path / "checkpoint", torch.float32)
    with pytest.raises(errors.CheckpointUnsupported, match="layer 1: 2"):
        index(root, tmp_path / "store")


def edit_config(root: Path, **changes: Any) -> None:
    """None: the key is removed."""
    path = root / "config.json"
    document = json.loads(path.read_text())
    for name, value in changes.items():
        document.pop(name, None)
        if value is not None:
            document[name] = value
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("said", ["missing", "null"])
def test_a_dtype_that_the_config_does_not_say_is_the_weights(said: str, tmp_path: Path) -> None:
    root = make("olmoe", tmp_path / "checkpoint", torch.bfloat16)
    edit_config(root, dtype=None)
    if said == "null":
        document = json.loads((root / "config.json").read_text())
        (root / "config.json").write_text(json.dumps(document | {"dtype": None}))
    assert AutoModelForCausalLM.from_pretrained(root).dtype == torch.bfloat16
    index(root, tmp_path / "store")
    check_exact(root, tmp_path / "store", torch.bfloat16, tmp_path)


def test_a_dtype_said_of_the_text_model_alone_is_the_weights(tmp_path: Path) -> None:
    root = save(tiny_config("qwen3_5_moe"), tmp_path / "checkpoint", torch.bfloat16)
    document = json.loads((root / "config.json").read_text())
    document.pop("dtype", None)
    document.get("text_config", document)["dtype"] = "bfloat16"
    (root / "config.json").write_text(json.dumps(document))
    index(root, tmp_path / "store")
    check_exact(root, tmp_path / "store", torch.bfloat16, tmp_path)


def change_weights(root: Path, change: Any) -> None:
    tensors = load_file(root / "model.safetensors")
    change(tensors)
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})


def test_experts_of_two_dtypes_are_refused(tmp_path: Path) -> None:
    root = make("olmoe", tmp_path / "checkpoint", torch.bfloat16)

    def half(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "layers.1.mlp.experts" in name:
                tensors[name] = tensors[name].half()

    change_weights(root, half)
    with pytest.raises(errors.CheckpointUnsupported, match=r"F16 on disk.*in one dtype"):
        index(root, tmp_path / "store")


def test_what_the_model_does_not_take_is_skipped(tmp_path: Path) -> None:
    """A layer for multi-token prediction behind the last, and a vision tower."""
    root = make("glm4_moe", tmp_path / "checkpoint", torch.float32)
    before = index(root, tmp_path / "before").sizing

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.eh_proj.weight"] = torch.zeros(64, 128)
        tensors["model.layers.2.mlp.gate.weight"] = torch.zeros(16, 64)
        for expert in range(16):
            tensors[f"model.layers.2.mlp.experts.{expert}.up_proj.weight"] = torch.zeros(32, 64)
        tensors["visual.patch_embed.proj.weight"] = torch.zeros(64, 3, 14, 14)

    change_weights(root, add)
    told = list[str]()
    manifest = index(root, tmp_path / "store", warn=told.append)
    assert manifest.sizing == before
    assert [tensor.name for tensor in manifest.spec.dense if "visual" in tensor.name] == []
    assert [sentence for sentence in told if sentence.startswith("skipped")] == [
        "skipped 19 tensors (0.3 MiB) that this model does not use: "
        "model.layers.2.eh_proj.weight, model.layers.2.mlp.experts.0.up_proj.weight and 17 more"
    ]
    check_exact(root, tmp_path / "store", torch.float32, tmp_path)


def test_a_weight_that_the_model_needs_and_nobody_stored_is_refused(tmp_path: Path) -> None:
    root = make("olmoe", tmp_path / "checkpoint", torch.bfloat16)
    change_weights(root, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(errors.CheckpointUnsupported, match=r"no tensor for model\.norm\.weight"):
        index(root, tmp_path / "store")


def test_weights_of_another_config_are_refused(tmp_path: Path) -> None:
    root = make("olmoe", tmp_path / "checkpoint", torch.bfloat16)
    edit_config(root, vocab_size=256)
    with pytest.raises(errors.CheckpointUnsupported, match=r"shape \(128, 64\) on disk"):
        index(root, tmp_path / "store")


def test_what_transformers_cannot_run_is_refused_with_its_words(tmp_path: Path) -> None:
    """A model of linear layers only: its cache does not know how long it is."""
    config = tiny_config("granitemoehybrid", layer_types=["linear_attention"] * 4)
    root = save(config, tmp_path / "checkpoint", torch.float32)
    for maker in (index, pack):
        with pytest.raises(errors.CheckpointUnsupported, match="get_seq_length"):
            maker(root, tmp_path / "store")


@pytest.mark.parametrize("model_type", ["zaya", "deepseek_v4"])
def test_routers_that_cannot_be_asked_are_named(model_type: str, tmp_path: Path) -> None:
    """A network routes in zaya, a table of token ids in deepseek_v4's first layers."""
    root = save(tiny_config(model_type), tmp_path / "checkpoint", torch.float32)
    said = list[str]()
    index(root, tmp_path / "store", warn=said.append)
    with engine(tmp_path / "store", tmp_path) as node:
        sequence = SequenceState("s", prompt())
        node.prefill(sequence)
        foreseen = set(node.loaded.routers.next_routers.routers)
        layers = set(node.loaded.spec.moe_layers)
    if model_type == "zaya":
        assert (
            "experts of layers 0, 1, 2, 3 are computed exactly but not read ahead: their routers "
            "have no weight that can be asked early"
        ) in said
        assert not foreseen
    else:
        assert 0 < len(foreseen) < len(layers)


@pytest.mark.parametrize(
    ("model_type", "is_known"), [("gpt_oss", True), ("gemma4", True), ("flex_olmo", False)]
)
def test_a_residual_stream_that_is_not_recognised_is_named(
    model_type: str, is_known: bool, tmp_path: Path
) -> None:
    """flex_olmo's experts get the stream itself, and no norm of it. Planted fault seen red: what
    was not recognised left unsaid.
    """
    root = save(tiny_config(model_type), tmp_path / "checkpoint", torch.float32)
    index(root, tmp_path / "store")
    with engine(tmp_path / "store", tmp_path) as node:
        sequence = SequenceState("s", prompt())
        node.prefill(sequence)
        sequence.token_ids.append(1)
        step = node.forward(sequence, [1], Phase.DECODE)[1]
    layers = node.loaded.spec.moe_layers
    assert sorted(step.streams) == (list(layers) if is_known else [])
    unknown = node.loaded.routers.layers_without_stream
    assert unknown == ([] if is_known else [str(layer) for layer in layers])
