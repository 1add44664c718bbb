"""A MoE layer computed the plain way, to compare with: no cache, no store, no order but one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from compute_node.kernels.expert_kernels import ExpertKernels
from compute_node.store.memory import TORCH_DTYPES
from expert_store.manifest.manifest import Manifest
from expert_store.manifest.sources import resolve_inside
from expert_store.offline.checkpoint.files import read_chunks
from proto.expert import ExpertKey, RecordKey


class FreshExperts:
    """Every expert is read from the file when it is wanted, into memory of its own, in ascending
    order.
    """

    def __init__(
        self, layer: int, kernels: ExpertKernels, manifest: Manifest, store_dir: Path
    ) -> None:
        self._layer, self._kernels = layer, kernels
        self._manifest = manifest
        self._root = manifest.root(store_dir)

    def forward(
        self, module: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Tensor:
        """One token. hidden: [1, D]; topk_ids, topk_weights: [1, K]. Returns [1, D]."""
        total = torch.zeros_like(hidden)
        weights = topk_weights[0].tolist()
        for expert, weight in sorted(zip(topk_ids[0].tolist(), weights, strict=True)):
            total += self._kernels.feed_forward(self.read(expert), hidden) * weight
        return total

    def read(self, expert: int) -> dict[str, Tensor]:
        """Its tensors by name. Raises ValueError for other bytes than were written."""
        key = ExpertKey(self._layer, expert)
        record, layout = (
            self._manifest.records[RecordKey(key)],
            self._manifest.spec.layouts[key.layer],
        )
        content, digest = bytearray(self._manifest.slot_bytes), xxhash.xxh3_64()
        for extent in record.extents:
            path = resolve_inside(self._root, self._manifest.files[extent.file].path)
            with path.open("rb") as file:
                chunks = read_chunks(file.fileno(), extent.offset_bytes, extent.length_bytes)
                data = b"".join(chunks)
            digest.update(data)
            content[extent.place_bytes : extent.place_bytes + len(data)] = data
        if digest.intdigest() != record.checksum:
            raise ValueError(f"{key} is damaged: make the store anew")
        whole = torch.frombuffer(content, dtype=torch.uint8)
        return {
            tensor.name: whole[offset : offset + tensor.length_bytes]
            .view(TORCH_DTYPES[tensor.dtype])
            .view(tensor.shape)
            for offset, tensor in zip(record.tensor_offsets, layout, strict=True)
        }
