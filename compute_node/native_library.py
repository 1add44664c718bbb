"""Finds native/*.c compiled, and says why it cannot be used. Imports no torch."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent / "native"

NOT_COMPILED = "it was not compiled when FlashMoE was installed"
CPU_LACKS_IT = "this CPU has no avx512_bf16"


@cache
def load() -> ctypes.CDLL | None:
    """None: see `obstacle`."""
    path = next(_FOLDER.glob("gemv.*so"), None)
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    return library if library.gemv_usable() else None


def obstacle() -> str:
    """Why the library is of no use here; empty when it is."""
    if load() is not None:
        return ""
    return CPU_LACKS_IT if any(_FOLDER.glob("gemv.*so")) else NOT_COMPILED
