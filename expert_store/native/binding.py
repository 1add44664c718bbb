"""Loads native/reads.c compiled and declares its functions."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent
_VERSION = 0x5FC3FDDE4C0C3837  # native/version.h has the same

NOT_COMPILED = "FlashMoE's asynchronous reads were not compiled when it was installed"
OUTDATED = "FlashMoE's asynchronous reads were compiled from older sources (install it again)"

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


class Read(ctypes.Structure):
    """One read to submit, as native/reads.c has it. name: comes back with the event"""

    _fields_ = (
        ("name", ctypes.c_uint64),
        ("buffer", ctypes.c_uint64),
        ("length_bytes", ctypes.c_uint64),
        ("offset_bytes", ctypes.c_int64),
        ("descriptor", ctypes.c_int64),
    )


class Event(ctypes.Structure):
    """One read that has ended, as native/reads.c has it. got_bytes: or an error number below 0"""

    _fields_ = (("name", ctypes.c_uint64), ("got_bytes", ctypes.c_int64))


@dataclass(frozen=True)
class Functions:
    """Those of native/reads.c, which says what they take. `event` keeps Python's lock: it returns
    at once. The others release it.
    """

    open: ctypes._NamedFuncPointer
    close: ctypes._NamedFuncPointer
    submit: ctypes._NamedFuncPointer
    event: ctypes._NamedFuncPointer


def load() -> Functions:
    """Raises OSError where the library was not compiled, or from other sources."""
    path = next(_FOLDER.glob("reads.*so"), None)
    if path is None:
        raise OSError(NOT_COMPILED)
    library, at_once = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
    library.reads_version.restype = _NUMBER
    if library.reads_version() != _VERSION:
        raise OSError(OUTDATED)
    library.reads_open.argtypes = (_NUMBER, _NUMBER, _POINTER)
    library.reads_close.argtypes = (_POINTER,)
    library.reads_submit.argtypes = (_POINTER, _POINTER, _NUMBER, _POINTER)
    at_once.reads_event.argtypes = (_POINTER, _POINTER)
    functions = Functions(
        library.reads_open, library.reads_close, library.reads_submit, at_once.reads_event
    )
    for function in (functions.open, functions.close, functions.submit, functions.event):
        function.restype = _NUMBER
    return functions
