"""A safetensors checkpoint as files, tensors and byte ranges; reads headers only, never weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from expert_store.sources import SourceFile
from proto import errors
from proto.expert import DTYPE_BYTES

_SHARD_INDEX = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_MAX_HEADER_BYTES = 512 * 1024 * 1024
_CHUNK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """offset_bytes is absolute in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """files: in the order that tensors refer to them."""

    root: Path
    files: tuple[SourceFile, ...]
    tensors: dict[str, CheckpointTensor]

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.length_bytes for tensor in self.tensors.values())

    def path(self, file: int) -> Path:
        return self.root / self.files[file].path

    @classmethod
    def open(cls, root: Path) -> Checkpoint:
        """Raises CheckpointUnsupported when there is none, ManifestInvalid naming a missing or
        damaged shard.
        """
        files: list[SourceFile] = []
        tensors: dict[str, CheckpointTensor] = {}
        for name in shard_names(root):
            header, header_bytes = read_header(root / name)
            files.append(_source_file(root, name, header_bytes))
            for tensor in _tensors(header, len(files) - 1, root / name, len(header_bytes)):
                tensors[tensor.name] = tensor
        return cls(root, tuple(files), tensors)


def shard_names(root: Path) -> list[str]:
    """Raises CheckpointUnsupported when the folder holds no safetensors checkpoint."""
    index = root / _SHARD_INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise errors.ManifestInvalid(f"{index} is damaged: {error!r}") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise errors.ManifestInvalid(f"{index} names {name!r}, which leaves the folder")
        return names
    if (root / _SINGLE_FILE).exists():
        return [_SINGLE_FILE]
    raise errors.CheckpointUnsupported(
        f"{root} has neither {_SINGLE_FILE} nor {_SHARD_INDEX}: "
        "give the folder of a Hugging Face checkpoint in safetensors format"
    )


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header, parsed and raw (length field included).

    Raises ManifestInvalid when the file is missing, cut off or not safetensors.
    """
    try:
        with path.open("rb") as file:
            length_field = file.read(8)
            length = int.from_bytes(length_field, "little")
            if len(length_field) < 8 or length > min(_MAX_HEADER_BYTES, path.stat().st_size):
                raise errors.ManifestInvalid(f"{path} is not a safetensors file")
            raw = file.read(length)
        header = json.loads(raw)
    except FileNotFoundError as error:
        raise errors.ManifestInvalid(f"shard {path} is missing: download it again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise errors.ManifestInvalid(f"{path} cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise errors.ManifestInvalid(f"{path} is not a safetensors file")
    header.pop("__metadata__", None)
    return header, length_field + raw


def _source_file(root: Path, name: str, header: bytes) -> SourceFile:
    stat = (root / name).stat()
    digest = hashlib.sha256(header).hexdigest()[:32]
    return SourceFile(name, stat.st_size, stat.st_mtime_ns, digest)


def _tensors(
    header: dict[str, Any], file: int, path: Path, data_start: int
) -> Iterator[CheckpointTensor]:
    size_bytes = path.stat().st_size
    for name, entry in header.items():
        try:
            begin, end = map(_count, entry["data_offsets"])
            dtype, shape = entry["dtype"], tuple(map(_count, entry["shape"]))
            expected = prod(shape) * DTYPE_BYTES[dtype]
        except (KeyError, TypeError, ValueError) as error:
            raise errors.ManifestInvalid(
                f"{path}: tensor {name!r} is damaged: {error!r}"
            ) from error
        if end - begin != expected:
            raise errors.ManifestInvalid(f"{path}: tensor {name!r} has the wrong size")
        if data_start + end > size_bytes:
            raise errors.ManifestInvalid(
                f"{path} is cut off ({size_bytes} bytes) before tensor {name!r}: download it again"
            )
        yield CheckpointTensor(name, dtype, shape, file, data_start + begin, expected)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def read_chunks(descriptor: int, offset_bytes: int, length_bytes: int) -> Iterator[bytes]:
    """The bytes of a range, in pieces, without leaving them in the page cache.

    Raises OSError, and EOFError when the file ends early.
    """
    done = 0
    while done < length_bytes:
        want = min(_CHUNK_BYTES, length_bytes - done)
        data = os.pread(descriptor, want, offset_bytes + done)
        if not data:
            raise EOFError(f"the file ends {length_bytes - done} bytes early")
        yield data
        done += len(data)
    os.posix_fadvise(descriptor, offset_bytes, length_bytes, os.POSIX_FADV_DONTNEED)
