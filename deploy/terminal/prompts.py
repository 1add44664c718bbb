"""Reads prompts from the command line, standard input and files. A text is one prompt; a .jsonl
file has one a line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from proto import errors

_LINES = ".jsonl"
_MOST_BYTES = 256 << 20  # a special file may have no end
_SUFFIXES = (".txt", _LINES)


@dataclass(frozen=True)
class Prompt:
    """name: the domain it belongs to, or the stem of its file."""

    name: str
    text: str


def choose_prompt(argument: str | None, file: Path | None) -> str:
    """The prompt of a command line; `-` in either place is standard input.

    Raises InvalidRequest when there is none, or two, or what is there is no text.
    """
    if (argument is None) == (file is None):
        raise errors.InvalidRequest(
            "give one prompt: as an argument, in --prompt-file FILE, or - to read standard input"
        )
    if argument == "-" or file == Path("-"):
        return _read_stdin()
    if file is not None:
        return _without_end(_read(file), str(file))
    assert argument is not None
    return as_text(argument, "the prompt")


def as_text(argument: str, what: str) -> str:
    """An argument of the command line as the text it is in UTF-8. What the locale does not know,
    Python keeps as half characters.

    Raises InvalidRequest.
    """
    try:
        argument.encode()
    except UnicodeEncodeError:
        return _decode(os.fsencode(argument), what)
    return argument


def _read_stdin() -> str:
    if sys.stdin is None:
        raise errors.InvalidRequest("standard input is closed: give the prompt as an argument")
    try:
        text = _decode(sys.stdin.buffer.read(_MOST_BYTES + 1), "standard input")
    except OSError as error:
        raise errors.InvalidRequest(f"cannot read standard input: {error.strerror}") from error
    return _without_end(text, "standard input")


def _without_end(text: str, where: str) -> str:
    """The text without the line break that editors and `echo` put at its end."""
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise errors.InvalidRequest(f"{where} is empty: write a prompt into it")
    return text


def read_prompts(paths: Sequence[Path]) -> list[Prompt]:
    """The prompts of all paths, in this order; a folder's .txt and .jsonl files by their names.

    Raises InvalidRequest naming what has no prompt in it, or cannot be read.
    """
    return [prompt for path in paths for file in _files(path) for prompt in _prompts(file)]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    if not files:
        raise errors.InvalidRequest(f"{path} has no .txt or .jsonl file: name one that has prompts")
    return files


def _prompts(file: Path) -> Iterator[Prompt]:
    text = _read(file)
    if not text.strip():
        raise errors.InvalidRequest(f"{file} is empty: write a prompt into it")
    if file.suffix != _LINES:
        yield Prompt(file.stem, text.rstrip("\n"))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _from_line(line, file, number)


def _read(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            data = opened.read(_MOST_BYTES + 1)
    except OSError as error:
        raise errors.InvalidRequest(f"cannot read {file}: {error.strerror}") from error
    return _decode(data, str(file))


def _decode(data: bytes, where: str) -> str:
    if len(data) > _MOST_BYTES:
        raise errors.InvalidRequest(f"{where} has more than {_MOST_BYTES >> 20} MiB: cut it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise errors.InvalidRequest(
            f"{where} is no UTF-8 from byte {error.start + 1} on: give it in UTF-8"
        ) from error


def _from_line(line: str, file: Path, number: int) -> Prompt:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError:
        fields = None
    text = fields.get("text") if isinstance(fields, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise errors.InvalidRequest(
            f'{file}, line {number} has no prompt: write {{"text": "...", "domain": "..."}}'
        )
    return Prompt(str(fields.get("domain") or file.stem), text)
