"""Small stores of random bytes, written without a model: fast, and odd in every offset."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import xxhash

from expert_store.manifest.extents import ExpertRecord, Extent
from expert_store.manifest.manifest import Manifest
from expert_store.manifest.sizing import Sizing
from expert_store.manifest.sources import SourceFile
from proto.expert import DenseTensor, ModelSpec, RecordKey, TensorLayout, Variant
from proto.shm import PAGE_BYTES
from proto.weight_format import WeightFormat

LAYERS, NUM_EXPERTS = (1, 3), 6
LAYOUT = (TensorLayout("gate_up_proj", "F32", (32, 64)), TensorLayout("down_proj", "F32", (16, 64)))
UP_BYTES, DOWN_BYTES = (tensor.length_bytes for tensor in LAYOUT)
PAYLOAD_BYTES = UP_BYTES + DOWN_BYTES
FILE_NAME = "weights.bin"
_START, _GAP, _DENSE_BYTES = 104, 200, 40
SMALL, SMALL_BYTES = "int4", 1000
KEYS = [RecordKey.exact(layer, expert) for layer in LAYERS for expert in range(NUM_EXPERTS)]
SIZING = Sizing(
    dense_bytes=_DENSE_BYTES,
    cache_bytes_per_token=8,
    cache_bytes_fixed=0,
    hidden_size=64,
    vocab_size=128,
    max_position_embeddings=256,
    activated_dense_bytes=_DENSE_BYTES,
    eager_attention_heads=0,
)


def write_store(folder: Path, seed: int = 0) -> Manifest:
    """Twelve experts of three pages in one file, none of them aligned, and a dense tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    path.write_bytes(random.Random(seed).randbytes(_start(len(KEYS)) + _DENSE_BYTES))
    manifest = describe(folder)
    manifest.write(folder)
    return manifest


def describe(folder: Path) -> Manifest:
    data, stat = (folder / FILE_NAME).read_bytes(), (folder / FILE_NAME).stat()
    dense = DenseTensor(
        "norm", "F32", (10,), FILE_NAME, _start(len(KEYS)), _DENSE_BYTES, _digest(data[-40:])
    )
    spec = ModelSpec("", "toy", LAYERS, NUM_EXPERTS, 2, dict.fromkeys(LAYERS, LAYOUT), (dense,))
    return Manifest(
        format="in-place",
        spec=spec,
        sizing=SIZING,
        source_root=".",
        files=(SourceFile(FILE_NAME, stat.st_size, stat.st_mtime_ns, ""),),
        records={key: _record(key, number, data) for number, key in enumerate(KEYS)},
    ).sealed()


def with_small_variant(folder: Path) -> Manifest:
    """The store of `write_store` with a second record of every expert: `SMALL_BYTES` of its
    bytes, under the name of a variant. Written.
    """
    manifest, data = Manifest.load(folder), (folder / FILE_NAME).read_bytes()
    layouts = dict.fromkeys(LAYERS, (TensorLayout("codes", "U8", (SMALL_BYTES,)),))
    spec = replace(manifest.spec, variants={SMALL: Variant(WeightFormat("int4", 32), layouts)})
    small = {key: _small_record(key, data) for key in small_keys()}
    changed = replace(manifest, spec=spec, records=manifest.records | small).sealed()
    changed.write(folder)
    return changed


def small_keys() -> list[RecordKey]:
    return [RecordKey(key.expert, SMALL) for key in KEYS]


def _small_record(key: RecordKey, data: bytes) -> ExpertRecord:
    start = expert_range(RecordKey(key.expert)).start
    place = start % PAGE_BYTES // 64 * 64
    checksum = _digest(data[start : start + SMALL_BYTES])
    return ExpertRecord(key, (Extent(0, start, SMALL_BYTES, place),), (place,), checksum)


def expert_range(key: RecordKey) -> range:
    """Where in the file the expert's bytes are."""
    start = _start(KEYS.index(key))
    return range(start, start + PAYLOAD_BYTES)


def expert_bytes(folder: Path, key: RecordKey) -> bytes:
    where = expert_range(key)
    return (folder / FILE_NAME).read_bytes()[where.start : where.stop]


def flip(path: Path, offset_bytes: int) -> None:
    """Damage one byte and leave size and time as they were."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(offset_bytes)
        byte = file.read(1)[0]
        file.seek(offset_bytes)
        file.write(bytes([byte ^ 0x40]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _start(number: int) -> int:
    return _START + number * (PAYLOAD_BYTES + _GAP)


def _digest(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


def _record(key: RecordKey, number: int, data: bytes) -> ExpertRecord:
    start = _start(number)
    place = start % PAGE_BYTES // 64 * 64
    extent = Extent(0, start, PAYLOAD_BYTES, place)
    checksum = _digest(data[start : start + PAYLOAD_BYTES])
    return ExpertRecord(key, (extent,), (place, place + UP_BYTES), checksum)
