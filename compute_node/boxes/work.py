"""What a main node wants of a layer's experts on another box, as tensors and as a message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from proto import errors
from proto import worker_pb2 as pb

_MOST_TOKENS = 65_536
_TOKENS_LIKE_ONE = 64  # reading an expert takes longer than multiplying them


@dataclass(frozen=True, eq=False)
class Work:
    """experts: distinct, ascending, each chosen by some token

    hidden: [T, D]; topk_ids: [T, K] int64; topk_weights: [T, K]
    """

    layer: int
    experts: Sequence[int]
    hidden: Tensor
    topk_ids: Tensor
    topk_weights: Tensor

    @property
    def size(self) -> float:
        """How much longer it takes than one expert and one token, roughly."""
        return len(self.experts) * max(1.0, len(self.hidden) / _TOKENS_LIKE_ONE)

    def to_pb(self, number: int) -> pb.WorkRequest:
        """Raises InvalidRequest for weights that are neither float32 nor of the model's dtype."""
        is_narrow = self.topk_weights.dtype != torch.float32
        if is_narrow and self.topk_weights.dtype != self.hidden.dtype:
            raise errors.InvalidRequest(
                f"routers give {self.topk_weights.dtype}, which no box takes: run on one box"
            )
        return pb.WorkRequest(
            id=number,
            layer=self.layer,
            experts=self.experts,
            num_tokens=len(self.hidden),
            hidden=bytes_of(self.hidden),
            topk_ids=bytes_of(self.topk_ids.to(torch.int32)),
            topk_weights=bytes_of(self.topk_weights.float()),
            narrow_weights=is_narrow,
        )

    @classmethod
    def from_pb(cls, request: pb.WorkRequest, hidden_size: int, dtype: torch.dtype) -> Work:
        """hidden_size, dtype: the model's. Raises InvalidRequest for what is no such work."""
        if not 0 < request.num_tokens <= _MOST_TOKENS or not request.experts:
            raise errors.InvalidRequest("work needs tokens and experts")
        hidden = tensor_of(request.hidden, dtype, request.num_tokens)
        ids = tensor_of(request.topk_ids, torch.int32, request.num_tokens).long()
        weights = tensor_of(request.topk_weights, torch.float32, request.num_tokens)
        if hidden.shape[1] != hidden_size or ids.shape != weights.shape:
            raise errors.InvalidRequest(
                f"hidden is {list(hidden.shape)}, topk_ids {list(ids.shape)}, topk_weights "
                f"{list(weights.shape)}: the model's hidden size is {hidden_size}"
            )
        experts = list(request.experts)
        if experts != sorted(set(experts)) or not set(experts) <= set(ids.flatten().tolist()):
            raise errors.InvalidRequest(
                "experts must be distinct, ascending, and chosen by a token"
            )
        if request.narrow_weights:
            weights = weights.to(dtype)
        return cls(request.layer, experts, hidden, ids, weights)


def bytes_of(tensor: Tensor) -> bytes:
    """As the wire has it: rows one after another, little endian."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def tensor_of(data: bytes, dtype: torch.dtype, num_rows: int) -> Tensor:
    """[num_rows, n], memory of its own. Raises InvalidRequest when the bytes are no such rows."""
    row_bytes, rest = divmod(len(data), max(1, num_rows))
    if num_rows < 1 or rest or not row_bytes or row_bytes % dtype.itemsize:
        raise errors.InvalidRequest(f"{len(data)} bytes are not {num_rows} rows of {dtype}")
    return torch.frombuffer(bytearray(data), dtype=dtype).view(num_rows, -1)
