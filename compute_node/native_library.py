"""Finds native/*.c compiled, and says why it cannot be used. Imports no torch."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent / "native"

NOT_COMPILED = "it was not compiled when FlashMoE was installed"
OUTDATED = "it was compiled from older sources (install FlashMoE again)"
CPU_LACKS_IT = "this CPU has no avx512_bf16"

_LATEST = "prompt_expert"  # the function that came last


@cache
def load() -> ctypes.CDLL | None:
    """None: see `obstacle`."""
    path = _path()
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    return library if library.gemv_usable() and hasattr(library, _LATEST) else None


def _path() -> Path | None:
    return next(_FOLDER.glob("gemv.*so"), None)


def obstacle() -> str:
    """Why the library is of no use here; empty when it is."""
    if load() is not None:
        return ""
    path = _path()
    if path is None:
        return NOT_COMPILED
    return OUTDATED if ctypes.CDLL(str(path)).gemv_usable() else CPU_LACKS_IT
