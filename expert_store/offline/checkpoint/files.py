"""A safetensors checkpoint as files, tensors and byte ranges; reads headers only, never weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from expert_store.manifest.sources import SourceFile
from expert_store.offline.checkpoint import foreign
from expert_store.offline.checkpoint.foreign import SHARD_INDEX, SINGLE_FILE
from expert_store.offline.checkpoint.progress import Warn, unheard
from proto import errors
from proto.expert import DTYPE_BYTES

_MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it
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

    def descriptors(self, stack: ExitStack) -> list[int]:
        """Its files, open for reading for the life of `stack`. Raises OSError."""
        found = []
        for file in self.files:
            found.append(os.open(self.root / file.path, os.O_RDONLY))
            stack.callback(os.close, found[-1])
        return found

    @classmethod
    def open(cls, root: Path, warn: Warn = unheard) -> Checkpoint:
        """Raises CheckpointUnsupported when there is none, or one of another format,
        ManifestInvalid naming a missing or damaged shard.
        """
        foreign.check_folder(root)
        for sentence in foreign.ignored_weights(root):
            warn(sentence)
        files: list[SourceFile] = []
        tensors: dict[str, CheckpointTensor] = {}
        for name in shard_names(root):
            header, header_bytes = read_header(root / name)
            files.append(_source_file(root, name, header_bytes))
            for tensor in _tensors(header, len(files) - 1, root / name, len(header_bytes)):
                tensors[tensor.name] = tensor  # of a name in two files the last, as transformers
        foreign.check_names(root, iter(tensors))
        return cls(root, tuple(files), tensors)


def shard_names(root: Path) -> list[str]:
    """The files that transformers' from_pretrained takes: what the config names, else the single
    file, else the shards of the index.

    Raises CheckpointUnsupported when the folder holds no safetensors checkpoint, ManifestInvalid.
    """
    config = foreign.read_config(root) if (root / foreign.CONFIG_NAME).exists() else {}
    foreign.check_config(root, config)
    chosen = config.get("transformers_weights")
    if chosen is not None:
        _check_inside(root / foreign.CONFIG_NAME, chosen)
        return _indexed(root / chosen) if chosen.endswith(".index.json") else [chosen]
    if (root / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    if (root / SHARD_INDEX).is_file():
        return _indexed(root / SHARD_INDEX)
    raise foreign.weights_missing(root)


def _indexed(index: Path) -> list[str]:
    """Raises ManifestInvalid."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise errors.ManifestInvalid(f"{index} is damaged: {error!r}: download it again") from error
    if not names:
        raise errors.ManifestInvalid(f"{index} names no shards: download it again")
    for name in names:
        _check_inside(index, name)
    return names


def _check_inside(document: Path, name: Any) -> None:
    plain = isinstance(name, str) and Path(name).name == name
    if not plain or "\0" in name or name in ("", ".."):
        raise errors.ManifestInvalid(f"{document} names {name!r}, which leaves the folder")


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header, parsed and raw (length field included).

    Raises ManifestInvalid when the file is missing, cut off or not safetensors.
    """
    try:
        with path.open("rb") as file:
            length_field = file.read(8)
            length = int.from_bytes(length_field, "little")
            if len(length_field) < 8 or length > _MAX_HEADER_BYTES:
                raise errors.ManifestInvalid(f"{path} {foreign.other_content(path)}")
            raw = file.read(length)
        if len(raw) < length:
            problem = foreign.other_content(path, "is cut off in its header")
            raise errors.ManifestInvalid(f"{path} {problem}")
        header = json.loads(raw)
    except FileNotFoundError as error:
        raise errors.ManifestInvalid(f"shard {path} is missing: download it again") from error
    except OSError as error:
        raise errors.ManifestInvalid(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise errors.ManifestInvalid(f"{path} {foreign.other_content(path)} ({error})") from error
    if not isinstance(header, dict):
        raise errors.ManifestInvalid(f"{path} {foreign.other_content(path)}")
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
        if isinstance(entry, dict):
            foreign.check_dtype(path, name, entry.get("dtype"))
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
