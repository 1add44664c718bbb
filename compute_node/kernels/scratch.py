"""Where weights are unpacked: memory that is used again. Fresh pages cost more than the work."""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)


_scratch = _Scratch()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Valid until the next on this thread; the memory grows to the largest asked for."""
    needed = prod(shape) * dtype.itemsize
    if _scratch.bytes.numel() < needed:
        _scratch.bytes = torch.empty(needed, dtype=torch.uint8)
    return _scratch.bytes[:needed].view(dtype).view(shape)
