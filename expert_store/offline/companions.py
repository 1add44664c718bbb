"""What stands beside the records in a packed store: dense weights, config, tokenizer, card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import xxhash

from expert_store.manifest.manifest import MANIFEST_NAME
from expert_store.offline.card import CARD_NAME, SOURCE_CARD_NAME, Card
from expert_store.offline.checkpoint.files import CheckpointTensor
from proto.expert import DenseTensor
from proto.shm import TENSOR_ALIGN_BYTES, align_up

DENSE_NAME = "dense.safetensors"
_CONFIG_NAME = "config.json"
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}

Dense = TypeVar("Dense", CheckpointTensor, DenseTensor)


def write_dense(
    store_dir: Path, tensors: Sequence[Dense], chunks_of: Callable[[Dense], Iterable[bytes]]
) -> tuple[DenseTensor, ...]:
    """The dense tensors as one safetensors file under their checkpoint names. chunks_of: a
    tensor's bytes
    """
    entries, cursor = {}, 0
    for tensor in tensors:
        span = [cursor, cursor + tensor.length_bytes]
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
        cursor += tensor.length_bytes
    header = json.dumps(entries).encode()
    header += b" " * (align_up(8 + len(header), TENSOR_ALIGN_BYTES) - 8 - len(header))
    described = []
    with (store_dir / DENSE_NAME).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors:
            offset_bytes, digest = file.tell(), xxhash.xxh3_64()
            for chunk in chunks_of(tensor):
                digest.update(chunk)
                file.write(chunk)
            described.append(
                DenseTensor(
                    name=tensor.name,
                    dtype=tensor.dtype,
                    shape=tensor.shape,
                    file=DENSE_NAME,
                    offset_bytes=offset_bytes,
                    length_bytes=tensor.length_bytes,
                    checksum=digest.intdigest(),
                )
            )
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return tuple(described)


def copy_side_files(root: Path, store_dir: Path, card: Card | None) -> None:
    """Config, tokenizer, card, licence: everything beside the weights.

    card: of what was made here; the checkpoint's own is kept beside it
    """
    for name in (CARD_NAME, SOURCE_CARD_NAME):
        (store_dir / name).unlink(missing_ok=True)  # of a killed run with another format
    for path in root.iterdir():
        is_weight = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".safetensors.index.json")
        if path.is_file() and not is_weight and path.name != MANIFEST_NAME:
            name = SOURCE_CARD_NAME if card and path.name == CARD_NAME else path.name
            shutil.copyfile(path, store_dir / name)
    _unquantise(store_dir / _CONFIG_NAME)
    if card:
        card.write(store_dir)


def _unquantise(config_path: Path) -> None:
    """What said how the checkpoint's weights were quantised is not true of the store."""
    config = json.loads(config_path.read_bytes())
    if config.pop("quantization_config", None) is not None:
        if not config.keys() & {"dtype", "torch_dtype"}:
            config["dtype"] = "bfloat16"
        config_path.write_text(json.dumps(config, indent=2) + "\n")
