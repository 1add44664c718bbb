"""The last line of a daemon that ends: its name, why, and which kind of error, for its starter.

Imports the standard library only, so that a daemon whose libraries cannot be loaded reports it.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from types import TracebackType

FAILURE, START_ERROR = 1, 2  # a daemon's exit status: trying again may help, or it would not
_HEAD, _TAIL = 300, 150
_HOLD_POLL_S = 0.5


def write(name: str, kind: str, text: str) -> str:
    """Write the line to stderr and return it. text: any number of lines; a long one loses its
    middle.
    """
    reason = " ".join(text.split())
    if len(reason) > _HEAD + _TAIL:
        reason = f"{reason[:_HEAD]} ... {reason[-_TAIL:]}"
    line = f"{name}: {reason} [{kind}]\n"
    sys.stderr.write(line)
    return line


def cannot_start(error: BaseException) -> str:
    """A sentence for an unforeseen error."""
    return f"{type(error).__name__}: {error}"


def hold(file: str, sentence: str) -> None:
    """Keep a refusal readable in `file` until somebody removes it, or SIGTERM ends the process."""
    try:
        with open(file, "w") as kept:
            kept.write(sentence)
    except OSError as error:
        sys.stderr.write(f"cannot write {file}: {error.strerror}\n{sentence}")
    while os.path.exists(file):
        time.sleep(_HOLD_POLL_S)


def report_failed_imports(name: str) -> None:
    """Report every uncaught error from now on as a start that cannot succeed: an import failed."""

    def refuse(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if not issubclass(kind, Exception):
            sys.__excepthook__(kind, error, trace)
            return
        traceback.print_exception(kind, error, trace)
        sentence = write(name, "StartFailed", cannot_start(error))
        sys.stderr.flush()
        if "--hold" in sys.argv[:-1]:
            hold(sys.argv[sys.argv.index("--hold") + 1], sentence)
        os._exit(START_ERROR)

    sys.excepthook = refuse
