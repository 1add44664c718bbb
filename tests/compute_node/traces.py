"""A small access trace, recorded from the shipped model: golden numbers stand on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PATH = Path(__file__).resolve().parent.parent / "traces" / "tiny-moe-decode.npz"


def load() -> tuple[NDArray[np.uint8], int]:
    """topk_ids [T, L, K] of consecutive decode steps, and E."""
    with np.load(PATH) as data:
        return data["topk_ids"], int(data["num_experts"])
