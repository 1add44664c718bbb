"""Where borrowed experts lie: the store's segment mapped read-only, or private slots filled from
chunks.

Both give tensors over a slot without a copy, and tell whether a slot still holds what was lent.
"""

from __future__ import annotations

import mmap
import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from proto import errors, shm
from proto.expert import EXACT_VARIANT, ExpertKey, RecordKey, TensorLayout

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True, eq=False)
class Borrowed:
    """An expert on loan, and what bringing it cost.

    slot, part, generation: what the store lent, see proto/shm.py
    size_bytes: what it counts against the quota
    tensors:    under the names of the experts module, views into the slot
    bytes_read: 0 when the store had it in memory
    read_s:     from the first byte asked of the device to the last that came
    verify_s:   checksumming after that
    variant:    of the expert's record
    """

    key: ExpertKey
    slot: int
    part: int
    generation: int
    size_bytes: int
    tensors: dict[str, Tensor]
    bytes_read: int = 0
    read_s: float = 0.0
    verify_s: float = 0.0
    variant: str = EXACT_VARIANT

    @property
    def is_exact(self) -> bool:
        return self.variant == EXACT_VARIANT

    @property
    def record(self) -> RecordKey:
        return RecordKey(self.key, self.variant)


class ExpertMemory(Protocol):
    """Slots as tensors."""

    def tensors(
        self, slot: int, start_bytes: int, offsets: Sequence[int], layout: Sequence[TensorLayout]
    ) -> dict[str, Tensor]:
        """A record that begins at `start_bytes` of the slot."""
        ...

    def generation(self, slot: int, part: int) -> int:
        """Differs from the lease's once the part was refilled."""
        ...


class SegmentMemory:
    """The store's segment, mapped read-only."""

    def __init__(self, path: str, epoch: int) -> None:
        """Raises SegmentInvalid when the file is not the segment of this epoch."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise errors.SegmentInvalid(f"cannot open segment {path}: {error.strerror}") from error
        try:
            file_bytes = os.fstat(descriptor).st_size
            if file_bytes == 0:
                raise errors.SegmentInvalid(f"segment {path} is empty")
            mapping = mmap.mmap(descriptor, file_bytes, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        self._view = memoryview(mapping)
        self._layout, found = shm.read_header(self._view, file_bytes)
        if found != epoch:
            raise errors.SegmentInvalid(f"segment {path} is of epoch {found}, not {epoch}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self._bytes = torch.frombuffer(mapping, dtype=torch.uint8)

    def tensors(
        self, slot: int, start_bytes: int, offsets: Sequence[int], layout: Sequence[TensorLayout]
    ) -> dict[str, Tensor]:
        start = self._layout.slot_offset_bytes(slot) + start_bytes
        return _cut(self._bytes, start, offsets, layout)

    def generation(self, slot: int, part: int) -> int:
        return shm.read_generation(self._view, self._layout, slot, part)


class PrivateMemory:
    """Slots of this process, for a store on another host. Filled by one thread, and read and
    released by another.
    """

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self._slot_bytes, self._lock = slot_bytes, threading.Lock()
        # Private: shared pages are the segment's where a stack's memory is measured.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._mapping = mmap.mmap(-1, num_slots * slot_bytes, flags=flags)
        self._bytes = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self._free = list(reversed(range(num_slots)))
        self._slots: dict[RecordKey, int] = {}
        self._digests: dict[RecordKey, xxhash.xxh3_64] = {}

    def add_chunk(
        self, key: RecordKey, offset_bytes: int, data: bytes, checksum: int | None
    ) -> None:
        """Place part of a record. checksum: given with the last part.

        Raises WeightsDamaged when the record arrived damaged, InvalidRequest when it does not fit.
        """
        if offset_bytes + len(data) > self._slot_bytes:
            raise errors.InvalidRequest(f"a chunk of {key} reaches beyond its slot")
        with self._lock:
            if key not in self._slots:
                if not self._free:
                    raise errors.InvalidRequest(f"a chunk of {key} arrived that nobody asked for")
                self._slots[key] = self._free.pop()
                self._digests[key] = xxhash.xxh3_64()
            start = self._slots[key] * self._slot_bytes + offset_bytes
        self._mapping[start : start + len(data)] = data
        self._digests[key].update(data)
        if checksum is not None and self._digests.pop(key).intdigest() != checksum:
            raise errors.WeightsDamaged(f"expert {key} was damaged on its way from the store")

    def slot_of(self, key: RecordKey) -> int:
        with self._lock:
            return self._slots[key]

    def release(self, key: RecordKey) -> None:
        with self._lock:
            self._free.append(self._slots.pop(key))

    def tensors(
        self, slot: int, start_bytes: int, offsets: Sequence[int], layout: Sequence[TensorLayout]
    ) -> dict[str, Tensor]:
        return _cut(self._bytes, slot * self._slot_bytes, offsets, layout)

    def generation(self, slot: int, part: int) -> int:
        return 0  # nobody else writes here


def _cut(
    memory: Tensor, start: int, offsets: Sequence[int], layout: Sequence[TensorLayout]
) -> dict[str, Tensor]:
    tensors = {}
    for offset, tensor in zip(offsets, layout, strict=True):
        begin = start + offset
        piece = memory[begin : begin + tensor.length_bytes]
        tensors[tensor.name] = piece.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)
    return tensors
