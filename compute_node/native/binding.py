"""Loads the compiled kernels and chooses entries for this CPU and process. Imports no torch."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import xxhash

_FOLDER = Path(__file__).parent
_VERSION = 0x26CB50A9B7C0BC13  # native/version.h has the same

NOT_COMPILED = "it was not compiled when FlashMoE was installed"
OUTDATED = "it was compiled from older sources (install FlashMoE again)"
TURNED_OFF = 'native = "off" in flashmoe.toml'

PORTABLE = "portable"  # portable/table.c has the same name

Setting = Literal["auto", "portable", "off"]

_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_THREADS = (_POINTER, _SIZE)  # OpenMP's entry, how many
_SHAPE = (_SIZE, _SIZE)
_NORM = (_POINTER, _POINTER, _FLOAT, _SIZE, _SIZE, _SIZE, _POINTER)
# What every entry takes, in the order of native/entries.h; none returns anything.
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


_setting: Setting = "auto"


class _Table(ctypes.Structure):
    """As native/entries.h has it."""

    _fields_ = (("isa", ctypes.c_char_p), *((name, _POINTER) for name in _ARGUMENTS))


def use(setting: Setting) -> None:
    """What this process computes with: the entries for its CPU, the portable ones, or torch alone.
    Call it before any model is loaded: choices made with other entries are not made again.
    """
    global _setting
    _setting = setting
    load.cache_clear()
    kernels.cache_clear()


def setting() -> Setting:
    """What `use` was given last."""
    return _setting


@cache
def kernels() -> SimpleNamespace:
    """The entries in charge, as functions. Call it only where `load` is not None."""
    table = load()
    assert table is not None
    return SimpleNamespace(
        **{
            name: ctypes.CFUNCTYPE(None, *arguments)(getattr(table, name))
            for name, arguments in _ARGUMENTS.items()
        }
    )


@cache
def load() -> _Table | None:
    """The entries in charge. None: see `obstacle`."""
    library = _open()
    if library is None or _is_outdated(library) or _setting == "off":
        return None
    library.kernels_entries.argtypes = (_SIZE,)
    library.kernels_entries.restype = ctypes.POINTER(_Table)
    table: _Table = library.kernels_entries(_setting == "portable").contents
    return table


def isa() -> str | None:
    """The instruction set whose entries are in charge: `avx512_bf16`, or `portable`, which runs on
    any CPU. None: see `obstacle`.
    """
    table = load()
    return None if table is None else str(table.isa.decode())


def build_id() -> str:
    """Changes with the compiled library and with the entries in charge; empty without them."""
    path = _path()
    if path is None or load() is None:
        return ""
    return f"{isa()}-{xxhash.xxh3_64_hexdigest(path.read_bytes())}"


def obstacle() -> str:
    """Why no entry is in charge; empty when one is."""
    library = _open()
    if library is None:
        return NOT_COMPILED
    if _is_outdated(library):
        return OUTDATED
    return TURNED_OFF if _setting == "off" else ""


def in_charge() -> str:
    """Which kernels compute here and what that means, for people."""
    match isa():
        case None:
            return f"torch's, about half the speed for one token of bf16: {obstacle()}"
        case "portable":
            return "portable C (no avx512_bf16 here), wherever it gives torch's bits"
        case name:
            return f"{name}: one token streams weights as memory does"


def _path() -> Path | None:
    return next(_FOLDER.glob("kernels.*so"), None)


def _open() -> ctypes.CDLL | None:
    path = _path()
    return None if path is None else ctypes.CDLL(str(path))


def _is_outdated(library: ctypes.CDLL) -> bool:
    if not hasattr(library, "kernels_version"):
        return True
    library.kernels_version.restype = _SIZE
    return bool(library.kernels_version() != _VERSION)
