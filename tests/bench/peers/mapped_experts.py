"""A baseline of our own: experts as views of a mapped packed file, the page cache in charge.

The node's model code runs on it unchanged. It leaves out what FlashMoE adds: a store, slots, a
policy, guesses, checksums.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from compute_node.cache.asked import NONE_SMALL, Meanwhile, never, sleep
from compute_node.cache.capacity import Capacity
from compute_node.cache.counters import LayerCounters
from compute_node.cache.latest_use import LatestUse
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.cache.waits import Waits
from compute_node.store.memory import TORCH_DTYPES, Borrowed
from expert_store.manifest.extents import Extent
from expert_store.manifest.manifest import Manifest
from proto.expert import ExpertKey, RecordKey

# The kernel reads no more ahead for one call than its read-ahead, or the device's largest request.
_ADVICE_BYTES = 128 * 1024


class MappedRoom:
    """Nothing has to go for anything."""

    def __init__(self) -> None:
        self.answers = LatestUse()

    def sparing_answers(self) -> AbstractContextManager[None]:
        return nullcontext()


class MappedExperts:
    """Plays the node's ExpertCache: nothing is ever missing, the kernel reads what is touched."""

    def __init__(self, store_dir: Path, manifest: Manifest) -> None:
        root = manifest.root(store_dir)
        self._files = [_map(root / file.path) for file in manifest.files]
        self._manifest = manifest
        self.counters = {layer: LayerCounters() for layer in manifest.spec.moe_layers}
        self.waits, self.room = Waits(self.counters), MappedRoom()
        spec = manifest.spec
        num_bytes = spec.num_experts_total * manifest.slot_bytes
        self.capacity = Capacity(
            num_bytes, manifest.slot_bytes, spec.moe_layers, spec.top_k, pooled=True
        )
        self.chooser = PolicyChooser("lru", 1.0, spec.moe_layers, spec.num_experts, lambda: None)

    def __contains__(self, key: ExpertKey) -> bool:
        return True

    def step(
        self,
        layer: int,
        experts: Sequence[int],
        check: Callable[[], None] = never,
        disproved: Callable[[], Sequence[ExpertKey]] = tuple,
        guess: Callable[[], Sequence[ExpertKey]] = tuple,
        meanwhile: Meanwhile = sleep,
        small: Mapping[int, str] = NONE_SMALL,
    ) -> tuple[set[int], Iterator[list[Borrowed]]]:
        """All experts of the step are asked of the kernel at once, then lent one by one."""
        check()
        keys = [ExpertKey(layer, expert) for expert in experts]
        for key in keys:
            self._will_need(key)
        return set(), ([self.lend(key)] for key in keys)

    def lend(self, key: ExpertKey) -> Borrowed:
        """Views into the file."""
        extent, record = self._extent(key), self._manifest.records[RecordKey(key)]
        tensors = {}
        for offset, layout in zip(
            record.tensor_offsets, self._manifest.spec.layouts[key.layer], strict=True
        ):
            begin = extent.offset_bytes + offset - extent.place_bytes
            piece = self._bytes(extent)[begin : begin + layout.length_bytes]
            tensors[layout.name] = piece.view(TORCH_DTYPES[layout.dtype]).view(layout.shape)
        return Borrowed(key, 0, 0, 0, 0, tensors)

    def _will_need(self, key: ExpertKey) -> None:
        extent = self._extent(key)
        mapping, _ = self._files[extent.file]
        end = extent.offset_bytes + extent.length_bytes
        for begin in range(extent.offset_bytes, end, _ADVICE_BYTES):
            mapping.madvise(mmap.MADV_WILLNEED, begin, min(_ADVICE_BYTES, end - begin))

    def _bytes(self, extent: Extent) -> torch.Tensor:
        return self._files[extent.file][1]

    def _extent(self, key: ExpertKey) -> Extent:
        """The only one: a packed record is in one piece."""
        [extent] = self._manifest.records[RecordKey(key)].extents
        return extent


def _map(path: Path) -> tuple[mmap.mmap, torch.Tensor]:
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return mapping, torch.frombuffer(mapping, dtype=torch.uint8)
