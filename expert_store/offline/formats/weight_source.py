"""The checkpoint's bytes while a store is packed, as a stream or as one matrix; nothing of them
stays in the page cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from expert_store.offline.checkpoint.files import Checkpoint, read_chunks
from expert_store.offline.checkpoint.parameters import EXPERT_DTYPES, ExpertParameter, Part
from expert_store.offline.formats import mxfp4
from proto import errors


class WeightSource:
    """Open files of a checkpoint, for the life of `stack`."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack) -> None:
        self._descriptors = checkpoint.descriptors(stack)

    def chunks(self, parts: Sequence[Part]) -> Iterator[bytes]:
        """The parts' bytes one after another. Raises ManifestInvalid for a file that ends early."""
        for part in parts:
            descriptor = self._descriptors[part.tensor.file]
            try:
                yield from read_chunks(descriptor, part.offset_bytes, part.length_bytes)
            except EOFError as error:
                raise errors.ManifestInvalid(
                    f"{part.tensor.name} cannot be read: {error}"
                ) from error

    def matrix(self, parameter: ExpertParameter, expert: int) -> Tensor:
        """An expert's slice of a matrix, [N, K]: outputs and inputs, whatever way round the module
        has them.

        Raises ManifestInvalid for a file that ends early.
        """
        parts = parameter.parts[expert]
        if parameter.encoding == "mxfp4":
            blocks, scales = (self._bytes([part]) for part in parts)
            return mxfp4.dequantise(blocks, scales, parameter.shape[0])
        plain = self._bytes(parts).view(EXPERT_DTYPES[parameter.dtype]).view(parameter.shape)
        return plain.T if parameter.is_transposed else plain

    def _bytes(self, parts: Sequence[Part]) -> Tensor:
        return torch.frombuffer(bytearray().join(self.chunks(parts)), dtype=torch.uint8)
