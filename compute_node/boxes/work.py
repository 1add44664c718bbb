"""What a main node wants of a layer's experts on another box, as tensors and as a message."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor

from proto import errors
from proto import worker_pb2 as pb

One = TypeVar("One")

_MOST_TOKENS = 65_536
_TOKENS_LIKE_ONE = 64  # reading an expert takes longer than multiplying them


@dataclass(frozen=True, eq=False)
class Work:
    """experts: distinct, ascending, each chosen by some token

    hidden: [T, D]; topk_ids, topk_weights: T times K; weights_dtype: the router's
    sequences: tokens of each sequence, one after another; each has the bits that it has alone
    """

    layer: int
    experts: Sequence[int]
    hidden: Tensor
    topk_ids: list[list[int]]
    topk_weights: list[list[float]]
    weights_dtype: torch.dtype
    sequences: Sequence[int]

    @classmethod
    def of(
        cls,
        layer: int,
        experts: Sequence[int],
        hidden: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        sequences: Sequence[int] = (),
    ) -> Work:
        """topk_ids, topk_weights: [T, K]; sequences: as above, empty: there is one. Raises
        InvalidRequest for weights that are neither float32 nor of the model's dtype.
        """
        dtype = topk_weights.dtype
        if dtype not in (torch.float32, hidden.dtype):
            raise errors.InvalidRequest(f"routers give {dtype}, which no box takes: run on one box")
        ids, weights = topk_ids.tolist(), topk_weights.tolist()
        return cls(layer, experts, hidden, ids, weights, dtype, sequences or [len(ids)])

    @property
    def size(self) -> float:
        """How much longer it takes than one expert and one token, roughly."""
        return len(self.experts) * max(1.0, len(self.hidden) / _TOKENS_LIKE_ONE)

    @property
    def is_decode(self) -> bool:
        """Whether it is one token a sequence."""
        return len(self.hidden) == len(self.sequences)

    @property
    def rows(self) -> Sequence[slice]:
        """Of each sequence."""
        return [slice(*ends) for ends in pairwise(accumulate(self.sequences, initial=0))]

    def chosen_by(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Ids and weights of these tokens, [t, K] each."""
        weights = torch.tensor(self.topk_weights[rows], dtype=self.weights_dtype)
        return torch.tensor(self.topk_ids[rows]), weights

    def to_pb(self, number: int) -> pb.WorkRequest:
        one_row = len(self.topk_ids) == 1
        return pb.WorkRequest(
            id=number,
            layer=self.layer,
            experts=self.experts,
            num_tokens=len(self.topk_ids),
            hidden=bytes_of(self.hidden),
            topk_ids=self.topk_ids[0] if one_row else _flat(self.topk_ids),
            topk_weights=self.topk_weights[0] if one_row else _flat(self.topk_weights),
            narrow_weights=self.weights_dtype != torch.float32,
            sequences=self.sequences if len(self.sequences) > 1 else (),
        )

    @classmethod
    def from_pb(cls, request: pb.WorkRequest, hidden_size: int, dtype: torch.dtype) -> Work:
        """hidden_size, dtype: the model's. Raises InvalidRequest for what is no such work."""
        num_tokens = request.num_tokens
        if not 0 < num_tokens <= _MOST_TOKENS or not request.experts:
            raise errors.InvalidRequest("work needs tokens and experts")
        sequences = list(request.sequences) or [num_tokens]
        if not all(sequences) or sum(sequences) != num_tokens:
            raise errors.InvalidRequest(f"sequences of {sequences} tokens are not {num_tokens}")
        hidden = tensor_of(request.hidden, dtype, num_tokens)
        ids, weights = list(request.topk_ids), list(request.topk_weights)
        width, rest = divmod(len(ids), num_tokens)
        if hidden.shape[1] != hidden_size or rest or not width or len(ids) != len(weights):
            raise errors.InvalidRequest(
                f"hidden is {list(hidden.shape)}, with {len(ids)} topk_ids and {len(weights)} "
                f"topk_weights: the model's hidden size is {hidden_size}"
            )
        experts = list(request.experts)
        if experts != sorted(set(experts)) or not set(ids).issuperset(experts):
            raise errors.InvalidRequest(
                "experts must be distinct, ascending, and chosen by a token"
            )
        return cls(
            request.layer,
            experts,
            hidden,
            _in_rows(ids, width),
            _in_rows(weights, width),
            dtype if request.narrow_weights else torch.float32,
            sequences,
        )


def _flat(rows: list[list[One]]) -> list[One]:
    return [one for row in rows for one in row]


def _in_rows(flat: list[One], width: int) -> list[list[One]]:
    return [flat[start : start + width] for start in range(0, len(flat), width)]


def bytes_of(tensor: Tensor) -> bytes:
    """As the wire has it: rows one after another, little endian."""
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def tensor_of(data: bytes, dtype: torch.dtype, num_rows: int) -> Tensor:
    """[num_rows, n], memory of its own, aligned as torch aligns it: its kernels round by that.

    Raises InvalidRequest when the bytes are no such rows.
    """
    row_bytes, rest = divmod(len(data), max(1, num_rows))
    if num_rows < 1 or rest or not row_bytes or row_bytes % dtype.itemsize:
        raise errors.InvalidRequest(f"{len(data)} bytes are not {num_rows} rows of {dtype}")
    found = torch.empty((num_rows, row_bytes // dtype.itemsize), dtype=dtype)
    ctypes.memmove(found.data_ptr(), data, len(data))
    return found
