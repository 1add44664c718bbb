"""Headers of safetensors files, whole or hostile.

Planted faults seen red: no check against the file's size, `end - begin` not compared with the
shape, shard names joined to the folder as they come, int() over whatever stands for a shape.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from expert_store.offline.checkpoint.files import Checkpoint, read_chunks, read_header, shard_names
from proto import errors

SHARDS = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def write_raw(path: Path, header: Any, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def test_tensors_are_where_safetensors_put_them(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.randn(2).bfloat16()}
    save_file(tensors, tmp_path / SINGLE, {"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path)
    data = (tmp_path / SINGLE).read_bytes()
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        found = checkpoint.tensors[name]
        raw = data[found.offset_bytes : found.offset_bytes + found.length_bytes]
        assert raw == tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert found.shape == tuple(tensor.shape)
    assert checkpoint.files[0].size_bytes == len(data)


def test_shards_are_numbered_in_order(tmp_path: Path) -> None:
    for name in ("two", "one"):
        save_file({name: torch.zeros(4)}, tmp_path / f"{name}.safetensors")
    weight_map = {"two": "two.safetensors", "one": "one.safetensors"}
    (tmp_path / SHARDS).write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint.open(tmp_path)
    assert [file.path for file in checkpoint.files] == ["one.safetensors", "two.safetensors"]
    assert [checkpoint.tensors[name].file for name in ("one", "two")] == [0, 1]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / SHARDS).write_text('{"weight_map": {"w": "gone.safetensors"}}')
    with pytest.raises(errors.ManifestInvalid, match=r"gone\.safetensors is missing: download"):
        Checkpoint.open(tmp_path)


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointUnsupported, match="safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "index",
    ["", "[]", "7", "{}", '{"weight_map": 3}', '{"weight_map": [1]}', "[" * 50_000],
)
def test_a_hostile_shard_index_is_refused(index: str, tmp_path: Path) -> None:
    (tmp_path / SHARDS).write_text(index)
    with pytest.raises(errors.ManifestInvalid):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "", "a\0b", 5, None, ["x"]])
def test_a_shard_outside_the_folder_is_refused(name: Any, tmp_path: Path) -> None:
    (tmp_path / SHARDS).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(errors.ManifestInvalid):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": [2], "data_offsets": ["a", "b"]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 16]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.5], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    ],
)
def test_a_damaged_tensor_is_named(entry: Any, tmp_path: Path) -> None:
    """The last one is right in itself, but the file ends before it."""
    write_raw(tmp_path / SINGLE, {"weight": entry}, b"12345678")
    with pytest.raises(errors.ManifestInvalid, match=rf"{SINGLE}.*'weight'"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "data",
    [b"", b"1234567", b"\xff" * 8, b"d" + bytes(7) + b"{}", b"\2" + bytes(7) + b"[]"],
)
def test_what_is_no_safetensors_file_is_named(data: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(data)
    with pytest.raises(errors.ManifestInvalid, match=SINGLE):
        read_header(tmp_path / SINGLE)


def test_a_deep_header_is_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / SINGLE, b"[" * 100_000)
    with pytest.raises(errors.ManifestInvalid, match=SINGLE):
        read_header(tmp_path / SINGLE)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_flipped_header_is_refused_or_fits_its_file(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    save_file({"a": torch.zeros(4), "b": torch.zeros(2)}, folder / SINGLE)
    raw = bytearray((folder / SINGLE).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 25))] = data.draw(st.integers(0, 255))
    (folder / SINGLE).write_bytes(raw)
    try:
        checkpoint = Checkpoint.open(folder)
    except errors.ManifestInvalid:
        return
    for tensor in checkpoint.tensors.values():
        assert 0 <= tensor.offset_bytes <= tensor.offset_bytes + tensor.length_bytes <= len(raw)


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / SINGLE)
    assert shard_names(tmp_path) == [SINGLE]


def test_ranges_come_whole_or_not_at_all(tmp_path: Path) -> None:
    data = os.urandom(5 * 1024 * 1024)
    (tmp_path / "file").write_bytes(data)
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        assert b"".join(read_chunks(descriptor, 3, len(data) - 3)) == data[3:]
        with pytest.raises(EOFError, match="1 bytes early"):
            list(read_chunks(descriptor, 3, len(data) - 2))
    finally:
        os.close(descriptor)
