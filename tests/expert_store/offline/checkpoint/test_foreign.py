"""Folders that people really give: each is refused in one sentence that names what it is and the
way out, or read as transformers reads it.

Planted faults seen red: no check of the folder (a hub id was "neither safetensors nor"), config
keys `quantization` and `compression_config` unknown, U32 called damage, the index preferred to
model.safetensors, remote code asked for, a hub cache's links refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.modeling_utils import _get_resolved_checkpoint_files

from expert_store.offline.checkpoint import foreign
from expert_store.offline.checkpoint.files import Checkpoint, shard_names
from expert_store.offline.index import index
from proto import errors
from tests.checkpoints import make
from tests.places import not_root

SINGLE, SHARDS = foreign.SINGLE_FILE, foreign.SHARD_INDEX
MXFP4 = {"quant_method": "mxfp4"}


@pytest.fixture
def root(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be changed."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen3_moe", tmp_path_factory.mktemp("sharded"), max_shard_size="50KB")


def edit_config(root: Path, **changes: Any) -> None:
    path = root / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(root: Path, match: str, kind: type[Exception] = errors.CheckpointUnsupported) -> None:
    with pytest.raises(kind, match=match) as caught:
        index(root, root.parent / "store")
    assert "\n" not in str(caught.value)
    assert not (root.parent / "store").exists()


def test_a_hub_id_is_told_from_a_folder_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(Path("Qwen/Qwen3-30B-A3B"), "hf download Qwen/Qwen3-30B-A3B --local-dir")
    refused(tmp_path / "a" / "b" / "c", "does not exist: give the folder")
    refused(Path("../a/b"), "does not exist: give the folder")


def test_files_and_empty_folders_are_named(root: Path, tmp_path: Path) -> None:
    refused(root / SINGLE, "is a file: give the folder")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    refused(tmp_path / "model.gguf", "is a GGUF file, for llama.cpp")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is empty")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("model-Q4_K_M.gguf", "GGUF file, for llama.cpp: give a bf16"),
        ("pytorch_model.bin", "PyTorch's own format: save it again in safetensors"),
        ("pytorch_model-00001-of-00002.bin", "PyTorch's own format"),
        ("consolidated.00.pth", "PyTorch's own format"),
        ("consolidated.safetensors", "its vendor's own layout"),
        ("flax_model.msgpack", "Flax's format"),
        ("model.onnx", "ONNX"),
        ("model.fp16.safetensors", r"neither .* \(but model\.fp16\.safetensors\)"),
    ],
)
def test_weights_of_another_format_are_named(name: str, match: str, root: Path) -> None:
    (root / SINGLE).rename(root / name)
    refused(root, match)


def test_a_store_and_a_cache_of_revisions_are_named(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "models--org--name" / "snapshots").mkdir(parents=True)
    refused(tmp_path / "models--org--name", "give a folder in .*snapshots")
    with pytest.raises(errors.CheckpointUnsupported, match="is a store already"):
        index(packed, tmp_path / "store")


def test_an_adapter_is_named(root: Path) -> None:
    """transformers with peft would add it to the weights, without peft it would not."""
    (root / "adapter_config.json").write_text("{}")
    refused(root, "adapter.*merge it into its model")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"quantization": {"bits": 4}, "quantization_config": {"bits": 4}}, "MLX checkpoint"),
        ({"compression_config": {"format": "pack-quantized"}}, r"\(compressed-tensors\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"\(fp8\)"),
        ({"quantization_config": {"bits": 4}}, r"\(unknown\)"),
        ({"quantization_config": "gptq"}, r"\(gptq\)"),
        ({"text_config": {"quantization_config": MXFP4}}, r"its text_config .*\(mxfp4\)"),
    ],
)
def test_quantised_weights_are_named_before_a_header_is_read(
    changes: dict[str, Any], match: str, root: Path
) -> None:
    edit_config(root, **changes)
    (root / SINGLE).write_bytes(b"")
    refused(root, match)


def test_mlx_is_told_by_its_tensors_too(root: Path) -> None:
    tensors = load_file(root / SINGLE)
    name = "model.layers.0.mlp.switch_mlp.up_proj.weight"
    save_file(tensors | {name: tensors["lm_head.weight"].clone()}, root / SINGLE)
    refused(root, "MLX checkpoint")
    entry = {"dtype": "U32", "shape": [2], "data_offsets": [0, 8]}
    raw = json.dumps({"w": entry}).encode()
    (root / SINGLE).write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    refused(root, r"'w' is U32, as in weights that MLX has quantised")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "is a web page"),
        (b"GGUF\3\0\0\0" + bytes(99), "is a GGUF file"),
        (b"PK\3\4" + bytes(99), "is a file of torch.save"),
        (bytes(4096), "is empty or was only allocated"),
        (b"", "is not a safetensors file"),
        (b"\xff" * 99, "is not a safetensors file"),
        ((99).to_bytes(8, "little") + b'{"a":', "cut off in its header"),
    ],
)
def test_what_a_file_is_instead_of_safetensors_is_named(
    data: bytes, match: str, root: Path
) -> None:
    (root / SINGLE).write_bytes(data)
    refused(root, match, errors.ManifestInvalid)


def test_shards_without_their_index_are_named(sharded: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sharded, tmp_path / "checkpoint"))
    (root / SHARDS).unlink()
    refused(root, rf"has shards .*no {SHARDS}.*download that file too")


def from_pretrained_reads(root: Path) -> list[str]:
    """The files that transformers itself would load the model from."""
    config = AutoConfig.from_pretrained(root)
    explicit = getattr(config, "transformers_weights", None)
    files, _ = _get_resolved_checkpoint_files(root, None, None, None, None, False, explicit)
    return [Path(file).name for file in files or []]


@pytest.mark.parametrize("chosen", [None, "other.safetensors", "other.safetensors.index.json"])
@pytest.mark.parametrize("stray", [False, True])
def test_the_files_read_are_those_that_transformers_reads(
    stray: bool, chosen: str | None, sharded: Path, tmp_path: Path
) -> None:
    """Red where the shards' index came before model.safetensors."""
    root = Path(shutil.copytree(sharded, tmp_path / "checkpoint"))
    if stray:
        shutil.copyfile(next(root.glob("model-*")), root / SINGLE)
    for source, target in (("model-00001*", "other.safetensors"), (SHARDS, f"other.{SHARDS[6:]}")):
        shutil.copyfile(next(root.glob(source)), root / target)
    if chosen:
        edit_config(root, transformers_weights=chosen)
    assert shard_names(root) == from_pretrained_reads(root)


@pytest.mark.parametrize("chosen", ["../x.safetensors", "/x.safetensors", 5, "", [], "gone"])
def test_a_hostile_choice_of_weights_is_refused(chosen: Any, root: Path) -> None:
    edit_config(root, transformers_weights=chosen)
    refused(root, "leaves the folder|missing", errors.ManifestInvalid)


def test_of_a_tensor_in_two_files_the_last_counts_as_in_transformers(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({"w": torch.full((4,), number)}, tmp_path / f"model-{number}.safetensors")
    weight_map = {"w": "model-1.safetensors", "v": "model-2.safetensors"}
    (tmp_path / SHARDS).write_text(json.dumps({"weight_map": weight_map}))
    assert Checkpoint.open(tmp_path).tensors["w"].file == 1


@pytest.fixture
def no_answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What anybody is asked; nobody may be."""
    asked: list[str] = []

    def ask(prompt: str = "") -> str:
        asked.append(prompt)
        return "y"

    monkeypatch.setattr("builtins.input", ask)
    yield asked
    assert asked == []


def test_code_that_comes_with_a_checkpoint_is_never_run(root: Path, no_answer: list[str]) -> None:
    """Red when transformers asks: "run the custom code? [y/N]", and y ran it."""
    (root / "code.py").write_text(f"open({str(root / 'ran')!r}, 'w')\nclass C: pass\n")
    edit_config(root, model_type="own", auto_map={"AutoConfig": "code.C"})
    refused(root, "'own' is known only to code that comes with it.*never run: use a checkpoint")
    assert not (root / "ran").exists()


def test_nor_is_it_asked_for_in_place_of_a_language_model(root: Path, no_answer: list[str]) -> None:
    config = {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "code.M"}}
    (root / "config.json").write_text(json.dumps(config))
    refused(root, "'vit' is no causal language model")


def test_a_model_that_transformers_knows_needs_no_code(root: Path, no_answer: list[str]) -> None:
    edit_config(root, auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    assert index(root, root.parent / "store").spec.model_type == "qwen3_moe"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"\xef\xbb\xbf{}",
        '{"a": "\xe9"}'.encode("latin1"),
        "{}".encode("utf-16"),
        b"[" * 60_000,
        b'{"model_type": 5}',
        b'{"model_type": [5]}',
        b'{"model_type": "qwen3_moe", "hidden_size": "x"}',
        b'{"model_type": "qwen3_moe", "dtype": "float99"}',
        b'{"model_type": "qwen3_moe", "auto_map": ["AutoConfig"]}',
    ],
)
def test_a_config_of_anything_is_refused_in_one_sentence(text: bytes, root: Path) -> None:
    (root / "config.json").write_bytes(text)
    refused(root, "config")


@pytest.mark.parametrize("closed", [".", "config.json", SINGLE])
def test_what_this_user_may_not_read_is_named(closed: str, checkpoint: Path, run_dir: Path) -> None:
    """Red: a bare "Permission denied" without the remedy, for the folder."""
    root = Path(shutil.copytree(checkpoint, run_dir / "checkpoint"))
    run_dir.chmod(0o755)
    (root / closed).chmod(0)
    with (
        not_root(),
        pytest.raises(errors.FlashMoEError, match=r"cannot be read.*Permission denied"),
    ):
        Checkpoint.open(root)
    root.chmod(0o700)
