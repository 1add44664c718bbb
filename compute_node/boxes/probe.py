"""What a worker computes before it is given work: with other bits it would change the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compute_node.boxes.work import Work, bytes_of
from proto import errors
from proto.expert import ModelSpec

_NUM_TOKENS = (1, 2, 17, 64)  # kernels differ by the number of rows


@dataclass(frozen=True, eq=False)
class Probe:
    """works: of the first and the last layer with experts
    expected: what each gives here
    """

    works: Sequence[Work]
    expected: Sequence[bytes]

    @classmethod
    def of(
        cls,
        compute: Callable[[Work], Tensor],
        spec: ModelSpec,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> Probe:
        """compute: by this processor, on the records of the own store"""
        dice = torch.Generator().manual_seed(0)
        ids = torch.arange(spec.top_k)
        works = [
            Work.of(
                key.layer,
                [key.expert],
                torch.randn(num_tokens, hidden_size, generator=dice).to(dtype),
                ids.repeat(num_tokens, 1),
                torch.rand(num_tokens, spec.top_k, generator=dice),
            )
            for key in spec.probe_keys
            for num_tokens in _NUM_TOKENS
        ]
        return cls(works, [bytes_of(compute(work)) for work in works])

    def check(self, address: str, work: Work, rows: bytes) -> None:
        """Raises OtherBits, which names the box."""
        if rows != self.expected[self.works.index(work)]:
            raise errors.OtherBits(
                f"{address} computes other bits than this processor does: take a box with the "
                "same kind of processor and the same number of threads, or serve without it"
            )
