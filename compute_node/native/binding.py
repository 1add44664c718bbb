"""Finds native/*.c compiled, declares its functions, and says why it cannot be used. Imports no
torch.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent
_VERSION = 0x31D148454EAD434A  # native/version.h has the same

NOT_COMPILED = "it was not compiled when FlashMoE was installed"
OUTDATED = "it was compiled from older sources (install FlashMoE again)"
CPU_LACKS_IT = "this CPU has no avx512_bf16"

_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_THREADS = (_POINTER, _SIZE)  # OpenMP's entry, how many
_SHAPE = (_SIZE, _SIZE)
_NORM = (_POINTER, _POINTER, _FLOAT, _SIZE, _SIZE, _SIZE, _POINTER)
# What every function takes, in the order of its declaration in C; none returns anything.
_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "gemv": (_POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, *_SHAPE, *_THREADS),
    "gemv_one": (*[_POINTER] * 4, *_SHAPE, *_THREADS),
    "gemm": (_POINTER, _SIZE, *[_POINTER] * 3, _SIZE, *_SHAPE, _SIZE, *_THREADS),
    "lossless_gemv": (*[_POINTER] * 2, _SIZE, _POINTER, _SIZE, _POINTER, *_SHAPE, *_THREADS),
    "lossless_unpack": (_POINTER, _POINTER, *_SHAPE, *_THREADS),
    "rms_norm": _NORM,
    "rms_norm_wide": _NORM,
    "experts": (*[_POINTER] * 2, _SIZE, _SIZE, *[_POINTER] * 5, *_SHAPE, *_THREADS),
    "add_rows": (_POINTER, _POINTER, *_SHAPE, _POINTER),
    "gate_of": (_POINTER, _POINTER, *_SHAPE, _POINTER),
    "prompt_experts": (_POINTER, _POINTER, _SIZE, *_THREADS),
    "add_rows_of_each": (_POINTER, _POINTER, _SIZE, *_SHAPE, _POINTER, *_THREADS),
}


@cache
def kernels() -> ctypes.CDLL:
    """The functions. Call it only where `load` is not None."""
    library = load()
    assert library is not None
    return library


@cache
def load() -> ctypes.CDLL | None:
    """None: see `obstacle`."""
    library = _open()
    if library is None or not library.kernels_usable() or _is_outdated(library):
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def obstacle() -> str:
    """Why the library is of no use here; empty when it is."""
    library = _open()
    if library is None:
        return NOT_COMPILED
    if not library.kernels_usable():
        return CPU_LACKS_IT
    return OUTDATED if _is_outdated(library) else ""


def _open() -> ctypes.CDLL | None:
    path = next(_FOLDER.glob("kernels.*so"), None)
    return None if path is None else ctypes.CDLL(str(path))


def _is_outdated(library: ctypes.CDLL) -> bool:
    if not hasattr(library, "kernels_version"):
        return True
    library.kernels_version.restype = _SIZE
    return bool(library.kernels_version() != _VERSION)
