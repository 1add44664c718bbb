"""What the command prints: results on stdout, everything else on stderr, an error in one
sentence.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from io import TextIOWrapper
from typing import Any, NoReturn

from rich.console import Console
from rich.text import Text

from proto import errors


class OutputClosed(BaseException):
    """Nobody reads what is written: `| head` has enough. Ends the command as Ctrl-C does."""


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        raise OutputClosed  # rich would leave with 1, which means damage here


_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}
out, err = _Console(**_PLAIN), _Console(stderr=True, **_PLAIN)

OK, DAMAGED, BAD_INPUT, NO_ROOM, UNAVAILABLE = 0, 1, 2, 3, 4
DEFECT, INTERRUPTED, OUTPUT_CLOSED = 70, 130, 141
EXIT_CODES = (
    "Exit codes: 0 done, 1 damage found or a check failed, 2 bad input or configuration, "
    "3 memory or queue does not suffice, 4 a daemon is away, stopping or too slow, "
    "70 a defect of FlashMoE, 130 interrupted, 141 nobody reads the output any more."
)


def prepare_output() -> None:
    """Make output possible that is closed, or whose encoding lacks a character."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  for the process's life
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Drop what is buffered: flushing it at its end, the interpreter would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())


def say(line: str) -> None:
    """Print what happens on stderr. A closed stderr does not end the command."""
    with suppress(OSError, OutputClosed):
        err.print(line)


def warn(sentence: str) -> None:
    """Print on stderr what the user should know of a verb that goes on."""
    err.print(f"flashmoe: {sentence}")


def fail(message: str, code: int) -> int:
    """Print an error in one line on stderr. Returns the exit code."""
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    say(f"flashmoe: {_printable(line)}")
    return code


def _printable(text: str) -> str:
    """The text with every unprintable character escaped: file names may hold any."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def exit_code(error: errors.FlashMoEError) -> int:
    """The code a script can act on."""
    if isinstance(error, errors.WeightsDamaged):
        return DAMAGED
    if isinstance(error, (errors.MemoryExceeded, errors.SlotsExhausted, errors.QueueFull)):
        return NO_ROOM
    if error.retryable or isinstance(error, errors.Cancelled):
        return UNAVAILABLE
    return DEFECT if type(error) is errors.FlashMoEError else BAD_INPUT


def table(title: str, rows: Mapping[str, str]) -> Text:
    """Two columns, no frame, a line a row however long: reads well in a log too."""
    width = max(map(len, rows), default=0)
    lines = [Text(title, "italic")] if title else []
    lines += [Text.assemble((name.ljust(width), "dim"), "  ", rows[name]) for name in rows]
    return Text("\n").join(lines)


def write(text: str) -> None:
    """A model's text, as it is: no markup, no wrapping, tabs stay tabs. Raises OutputClosed."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise OutputClosed from error


def write_all(texts: Iterable[str]) -> None:
    """Write a text part by part, and end its line also when an error breaks it off."""
    begun = False
    try:
        for text in texts:
            write(text)
            begun = True
    finally:
        if begun:
            write("\n")


def flush() -> None:
    """Raises OutputClosed, OSError."""
    write("")


def print_json(value: Any) -> None:
    write(json.dumps(value) + "\n")


def size(count: float) -> str:
    """`1.4 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
