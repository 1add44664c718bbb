"""A packed store of a model that nobody trained: real geometry, int4 experts of random codes.

No checkpoint is written first. Records, layouts and the plan's figures come from expert_store's own
writers; the dense weights share one small pool of random numbers, followed by a hole that takes no
disk, so that their memory and their products cost what they would.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import xxhash
from torch import Tensor
from transformers import AutoConfig

from expert_store.manifest.manifest import Manifest
from expert_store.manifest.sources import SourceFile
from expert_store.offline.checkpoint.architecture import (
    Architecture,
    build_meta,
    load_config,
    read_architecture,
)
from expert_store.offline.checkpoint.files import CheckpointTensor, read_chunks
from expert_store.offline.checkpoint.parameters import ExpertParameter
from expert_store.offline.checkpoint.progress import Report, silent
from expert_store.offline.formats.int4 import Int4Encoder
from expert_store.offline.formats.weight_source import WeightSource
from expert_store.offline.index import make_spec, measure
from expert_store.offline.record_file import JOURNAL_NAME, RECORDS_NAME, record_file
from expert_store.offline.records import RecordWriter
from proto.expert import EXACT_VARIANT, DenseTensor, TensorLayout
from proto.shm import PAGE_BYTES, align_up

MODEL_TYPE = "gpt_oss"
GPT_OSS_20B = {"num_hidden_layers": 24, "num_local_experts": 32}  # what differs from gpt-oss-120b
POOL_BYTES = 64 << 20
POOL_NAME = "dense.bin"
_MARGIN_BYTES = 256 << 20
_SPREAD = 0.02  # of dense weights, as transformers initialises them
_SCALE = 0.01  # of codes: weights a few hundredths wide, so that activations stay finite


class NoRoom(OSError):
    """The disk is too full."""


class RandomCodes(Int4Encoder):
    """int4 records as the product lays them out, of nothing."""

    def __init__(self, architecture: Architecture, seed: int) -> None:
        super().__init__(architecture)
        self._words = np.random.Generator(np.random.SFC64(seed))
        self._floats = torch.Generator().manual_seed(seed)

    def encode(
        self, parameter: ExpertParameter, expert: int, source: WeightSource
    ) -> Iterator[Iterable[bytes]]:
        """In the order asked for: a store made anew with the same seed is the same."""
        for tensor in self.layout(parameter):
            yield [self._codes(tensor) if tensor.dtype == "U8" else self._numbers(tensor)]

    def _codes(self, tensor: TensorLayout) -> bytes:
        words = -(-tensor.length_bytes // 8)
        drawn = self._words.integers(0, 1 << 64, words, dtype=np.uint64)
        return drawn.tobytes()[: tensor.length_bytes]

    def _numbers(self, tensor: TensorLayout) -> bytes:
        """Scales with zeros between half and one and a half of _SCALE; biases too."""
        drawn = torch.empty(tensor.shape).uniform_(0.5, 1.5, generator=self._floats)
        return as_bytes(drawn * _SCALE)


class NoSource(WeightSource):
    """There is no checkpoint, and nobody asks."""

    def __init__(self) -> None:
        pass


def make(
    store_dir: Path, geometry: Mapping[str, Any], seed: int = 0, report: Report = silent
) -> Manifest:
    """A whole store in `store_dir`, which must not exist. geometry: what differs from the model
    type's own config.

    Raises NoRoom, before anything large is written.
    """
    store_dir.mkdir(parents=True)
    config = AutoConfig.for_model(MODEL_TYPE, dtype="bfloat16", **geometry)
    config.architectures = ["GptOssForCausalLM"]
    config.save_pretrained(store_dir)
    architecture = describe(store_dir)
    writer = RecordWriter(
        architecture, {EXACT_VARIANT: RandomCodes(architecture, seed)}, NoSource()
    )
    _check_room(store_dir, writer.total_bytes)
    with record_file(store_dir, {}, writer.total_bytes, report) as file:
        records = writer.write(file)
    (store_dir / JOURNAL_NAME).unlink()
    dense = _write_dense(store_dir / POOL_NAME, architecture.dense, seed)
    manifest = Manifest(
        format="packed",
        spec=make_spec(architecture, dense, writer.variants),
        sizing=measure(architecture),
        source_root=".",
        files=tuple(_source_file(store_dir / name) for name in (RECORDS_NAME, POOL_NAME)),
        records=records,
    ).sealed()
    manifest.write(store_dir)
    return manifest


def _check_room(folder: Path, experts_bytes: int) -> None:
    free, needed = shutil.disk_usage(folder).free, experts_bytes + POOL_BYTES + _MARGIN_BYTES
    if free < needed:
        raise NoRoom(f"the store needs {needed:,} bytes, {folder.parent} has {free:,} free")


def describe(model_dir: Path) -> Architecture:
    """As if a checkpoint of that config were there, one bf16 file."""
    model = build_meta(load_config(model_dir))
    tensors, cursor = {}, 0
    for name, parameter in model.state_dict().items():
        length_bytes = parameter.numel() * parameter.element_size()
        shape = tuple(parameter.shape)
        tensors[name] = CheckpointTensor(name, "BF16", shape, 0, cursor, length_bytes)
        cursor += length_bytes
    return read_architecture(model_dir, tensors)


def file_system(folder: Path) -> str:
    """Its type, as the kernel calls it."""
    mounts = {Path(disk.mountpoint): disk.fstype for disk in psutil.disk_partitions(all=True)}
    found = folder.resolve()
    return next((mounts[one] for one in (found, *found.parents) if one in mounts), "")


def as_bytes(values: Tensor) -> bytes:
    """In bf16."""
    return values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()


def _write_dense(
    path: Path, tensors: tuple[CheckpointTensor, ...], seed: int
) -> tuple[DenseTensor, ...]:
    """Ones, which norms are made of; then the pool, which all others begin with; then a hole."""
    norms = [t for t in tensors if _is_norm(t)]
    ones_bytes = align_up(max(t.length_bytes for t in norms), PAGE_BYTES)
    longest = max(t.length_bytes for t in tensors)
    random = torch.Generator().manual_seed(seed)
    pool = torch.empty(min(POOL_BYTES, longest) // 2).normal_(0, _SPREAD, generator=random)
    with path.open("wb") as file:
        file.write(as_bytes(torch.ones(ones_bytes // 2)) + as_bytes(pool))
        file.truncate(ones_bytes + longest)
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb") as file:
        return tuple(_dense(file.fileno(), t, 0 if _is_norm(t) else ones_bytes) for t in tensors)


def _is_norm(tensor: CheckpointTensor) -> bool:
    return "norm" in tensor.name


def _dense(descriptor: int, tensor: CheckpointTensor, offset_bytes: int) -> DenseTensor:
    digest = xxhash.xxh3_64()
    for chunk in read_chunks(descriptor, offset_bytes, tensor.length_bytes):
        digest.update(chunk)
    return DenseTensor(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        file=POOL_NAME,
        offset_bytes=offset_bytes,
        length_bytes=tensor.length_bytes,
        checksum=digest.intdigest(),
    )


def _source_file(path: Path) -> SourceFile:
    stat = path.stat()
    return SourceFile(path.name, stat.st_size, stat.st_mtime_ns, "")
