"""What transformers keeps of a sequence under way: KV, recurrent and convolution states. The plan
reserves memory by the bytes that this counts, and the node reports them. Imports torch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def state_bytes(cache: Any) -> int:
    """Bytes of all tensors that a transformers cache holds, each counted once, whatever its class.

    cache: None before the first pass: nothing
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
