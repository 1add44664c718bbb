"""Counts the bytes of a sequence's state: KV, recurrent and convolution states of transformers.
The plan reserves this memory, and the node reports it. Imports torch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def state_bytes(cache: Any) -> int:
    """Bytes of all tensors that a transformers cache holds, each counted once, whatever its class.

    cache: None before the first pass, which counts 0
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(cache))


def _tensors(cache: Any) -> list[Tensor]:
    seen: dict[int, Any] = {}
    pending: list[Any] = [cache]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple)):
            pending.extend(value)
        elif type(value).__module__.startswith("transformers."):
            pending.extend(vars(value).values())
    return [value for value in seen.values() if isinstance(value, Tensor)]
