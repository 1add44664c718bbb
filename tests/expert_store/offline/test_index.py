"""Reading a checkpoint in place: every byte ends up where its module wants it, or a named refusal.

Planted faults seen red: tensor starts not rounded down to 64, a landing that ignores the read
before it, adjacent parts never merged, patterns in another order (up before gate), the journal
ignored, a link out of the checkpoint found only by the daemon.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from compute_node.model.dense_weights import reading_dense
from expert_store.io.files import SourceFiles
from expert_store.manifest.extents import ExpertRecord, slot_bytes_needed
from expert_store.manifest.manifest import Manifest, check_sources
from expert_store.offline import index as module
from expert_store.offline.checkpoint import parameters
from expert_store.offline.checkpoint.architecture import experts_modules
from expert_store.offline.checkpoint.files import CheckpointTensor
from expert_store.offline.checkpoint.parameters import Part
from expert_store.offline.index import index, is_indexed, lay_out
from expert_store.offline.pack import pack
from expert_store.offline.verify import verify
from expert_store.store.verified_read import read_record
from proto import errors
from proto.expert import RecordKey
from tests.checkpoints import make


@st.composite
def checkpoints(draw: st.DrawFn) -> list[list[Part]]:
    """Tensors of one expert, in parts anywhere in two files, some right behind another."""
    sizes = st.sampled_from([1, 2, 64, 100, 4096, 5000, 12288])
    gaps = st.sampled_from([0, 0, 1, 63, 64, 4096, 7777])
    cursors = [draw(st.integers(0, 9000)), draw(st.integers(0, 9000))]
    tensors = [[draw(sizes) for _ in range(draw(st.integers(1, 3)))] for _ in range(3)]
    slots = draw(st.permutations([(t, p) for t, parts in enumerate(tensors) for p in parts]))
    placed: dict[int, list[Part]] = {0: [], 1: [], 2: []}
    for tensor, size in slots:
        file = draw(st.integers(0, 1))
        start = cursors[file] + draw(gaps)
        cursors[file] = start + size
        placed[tensor].append(
            Part(CheckpointTensor("t", "U8", (size,), file, start, size), start, size)
        )
    return list(placed.values())


@settings(deadline=None, max_examples=200)
@given(tensors=checkpoints(), seed=st.integers(0, 99))
def test_every_tensor_ends_up_whole_and_aligned(
    tensors: list[list[Part]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("extents")
    files = [random.Random(seed + n).randbytes(200_000) for n in range(2)]
    for number, data in enumerate(files):
        (folder / str(number)).write_bytes(data)
    extents, offsets = lay_out(tensors)
    payload = [files[e.file][e.offset_bytes : e.offset_bytes + e.length_bytes] for e in extents]
    record = ExpertRecord(
        RecordKey.exact(0, 0), extents, offsets, xxhash.xxh3_64_intdigest(b"".join(payload))
    )
    slot = bytearray(slot_bytes_needed(extents) + 4096)
    with ExitStack() as stack:
        sources = SourceFiles([folder / "0", folder / "1"], False, stack)
        read_record(sources, record, memoryview(slot)[:-4096])
    assert slot[-4096:] == bytes(4096), "read beyond the slot"
    for parts, offset in zip(tensors, offsets, strict=True):
        want = b"".join(
            files[p.tensor.file][p.offset_bytes : p.offset_bytes + p.length_bytes] for p in parts
        )
        assert offset % 64 == 0
        assert slot[offset : offset + len(want)] == want


def parts(*ranges: tuple[int, int]) -> list[Part]:
    return [Part(CheckpointTensor("t", "U8", (n,), 0, at, n), at, n) for at, n in ranges]


def test_neighbours_become_one_read() -> None:
    """Gate, up and down behind one another, whatever the order of the module's parameters."""
    extents, offsets = lay_out([parts((8320, 64)), parts((8192, 64), (8256, 64))])
    assert len(extents) == 1
    assert offsets == (128, 0)
    assert extents[0].place_bytes == 0
    extents, _ = lay_out([parts((0, 100)), parts((100, 100))])
    assert len(extents) == 2, "the second tensor would start off its alignment"


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "granitemoe", "gpt_oss", "deepseek_v2"])
@pytest.mark.parametrize("max_shard_size", ["50KB", "5GB"])
def test_experts_read_in_place_are_transformers_own(
    name: str, max_shard_size: str, tmp_path: Path
) -> None:
    """Apart as w1/w2/w3 (mixtral), fused (granitemoe), fused, transposed, with biases (gpt_oss)."""
    root = make(name, tmp_path / "checkpoint", max_shard_size=max_shard_size)
    assert (len(list(root.glob("*.safetensors"))) > 1) == (max_shard_size == "50KB")
    manifest = index(root, tmp_path / "store")
    assert Manifest.load(tmp_path / "store") == manifest
    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.bfloat16)
    check_experts(manifest, root, model)
    assert manifest.spec.dense_bytes + manifest.expert_bytes_total == sum(
        tensor.nbytes
        for shard in root.glob("*.safetensors")
        for tensor in load_file(shard).values()
    )


def check_experts(manifest: Manifest, root: Path, model: Any) -> None:
    spec = manifest.spec
    modules = experts_modules(model)
    assert list(modules) == list(spec.moe_layers)
    with ExitStack() as stack:
        sources = SourceFiles([root / file.path for file in manifest.files], True, stack)
        slot = torch.zeros(manifest.slot_bytes + 4096, dtype=torch.uint8)
        slot = slot[-slot.data_ptr() % 4096 :][: manifest.slot_bytes]
        for key, record in manifest.records.items():
            read_record(sources, record, memoryview(slot.numpy()))
            layout = spec.layouts[key.expert.layer]
            for tensor, offset in zip(layout, record.tensor_offsets, strict=True):
                raw = slot[offset : offset + tensor.length_bytes]
                found = raw.view(torch.bfloat16).view(tensor.shape)
                parameter = getattr(modules[key.expert.layer][1], tensor.name)
                assert torch.equal(found, parameter[key.expert.expert]), f"{key} {tensor.name}"


def test_goes_on_where_it_was_interrupted(
    checkpoint: Path, indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when the journal is ignored: everything is read twice."""
    monkeypatch.setattr(module, "_FLUSH_BYTES", 0)
    read_bytes = count_reads(monkeypatch)

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index(checkpoint, tmp_path, interrupt)
    assert not (tmp_path / "manifest.json").exists()
    before = sum(read_bytes)
    manifest = index(checkpoint, tmp_path)
    total = manifest.expert_bytes_total + manifest.spec.dense_bytes
    assert total // 2 < before < total
    assert sum(read_bytes) == total
    assert manifest.records == Manifest.load(indexed).records
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    real, sizes = os.pread, []

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        data = real(descriptor, length, offset)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", pread)
    return sizes


def test_a_checkpoint_that_changed_meanwhile_starts_over(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FLUSH_BYTES", 0)
    root = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, root)

    def interrupt(done: int, total: int) -> None:
        os.utime(root / "model.safetensors", ns=(1, 1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index(root, tmp_path / "store", interrupt)
    read_bytes = count_reads(monkeypatch)
    manifest = index(root, tmp_path / "store")
    assert sum(read_bytes) == manifest.expert_bytes_total + manifest.spec.dense_bytes


def test_knows_when_it_is_up_to_date(checkpoint: Path, tmp_path: Path) -> None:
    root, store = tmp_path / "checkpoint", tmp_path / "store"
    shutil.copytree(checkpoint, root)
    assert not is_indexed(root, store)
    index(root, store)
    assert is_indexed(root, store)
    os.utime(root / "model.safetensors", ns=(1, 1))
    assert not is_indexed(root, store)


def edit_config(root: Path, **changes: Any) -> None:
    path = root / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be broken."""
    shutil.copytree(checkpoint, tmp_path / "broken")
    return tmp_path / "broken"


def refused(root: Path, match: str, kind: type[Exception] = errors.CheckpointUnsupported) -> None:
    with pytest.raises(kind, match=match):
        index(root, root.parent / "store")
    assert not (root.parent / "store" / "manifest.json").exists()


def test_quantised_weights_are_named(broken: Path) -> None:
    edit_config(broken, quantization_config={"quant_method": "gptq"})
    refused(broken, "quantised on disk.*gptq")


def test_a_dense_architecture_is_named(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    refused(tmp_path / "dense", "'llama' has no experts")


def test_another_dtype_than_the_configs_is_named(broken: Path) -> None:
    edit_config(broken, dtype="float32")
    refused(broken, r"experts\.0.* is BF16 on disk.*float32")


def test_a_missing_expert_is_named(broken: Path) -> None:
    path = broken / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.experts.7.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    refused(broken, "needs 16 tensors like .*up_proj.*the checkpoint has 15")


def test_a_missing_layer_is_named(broken: Path) -> None:
    path = broken / "model.safetensors"
    tensors = {name: t for name, t in load_file(path).items() if "layers.1.mlp.experts" not in name}
    save_file(tensors, path, {"format": "pt"})
    refused(broken, r"no tensor for model\.layers\.1\.mlp\.experts")


def test_a_conversion_that_needs_arithmetic_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parameters, "MergeModulelist", type("Other", (), {}))
    with pytest.raises(errors.CheckpointUnsupported, match=r"cannot be read in place.*Merge"):
        index(checkpoint, tmp_path / "store")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": "no-such"}', '"x"', "\0"])
def test_a_config_that_transformers_cannot_read_is_named(text: str, broken: Path) -> None:
    (broken / "config.json").write_text(text)
    refused(broken, "config")


def test_a_missing_config_is_named(broken: Path) -> None:
    (broken / "config.json").unlink()
    refused(broken, "config")


def test_a_link_out_of_the_checkpoint_is_refused_before_reading(broken: Path) -> None:
    """Red when only the daemon looks: it would refuse the store after hours of reading."""
    (broken / "model.safetensors").rename(broken.parent / "blob")
    (broken / "model.safetensors").symlink_to("../blob")
    refused(broken, "leaves the source folder.*flashmoe pack", errors.ManifestInvalid)


def test_a_store_may_be_named_by_a_link_to_a_folder_that_is_not_there_yet(
    checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to("disk/store")
    manifest = index(checkpoint, tmp_path / "link")
    assert Manifest.load(tmp_path / "disk" / "store") == manifest
    assert manifest.root(tmp_path / "link") == checkpoint


def test_a_hub_caches_links_are_read_in_place(checkpoint: Path, tmp_path: Path) -> None:
    """Red when a link out of the folder is refused, wherever it leads."""
    model = tmp_path / "models--org--name"
    root = model / "snapshots" / "0123abcd"
    root.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        shutil.copyfile(path, model / "blobs" / f"{number}")
        (root / path.name).symlink_to(f"../../blobs/{number}")
    manifest = index(root, tmp_path / "store")
    assert manifest.root(tmp_path / "store") == root
    check_sources(manifest, root)
    assert verify(tmp_path / "store") == []
    assert manifest.spec == index(checkpoint, tmp_path / "plain").spec
    pack(root, tmp_path / "packed")
    assert verify(tmp_path / "packed") == []
    with reading_dense(root, manifest.spec.dense) as dense:
        assert dense().keys() == {tensor.name for tensor in manifest.spec.dense}


def test_a_store_that_cannot_be_written_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.ManifestInvalid, match="cannot write"):
        index(checkpoint, tmp_path / "file" / "store")
