"""Prompts from files: a text is one, a .jsonl file has one a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from proto import errors

_LINES = ".jsonl"
_SUFFIXES = (".txt", _LINES)


@dataclass(frozen=True)
class Prompt:
    """name: the domain it belongs to, or the stem of its file."""

    name: str
    text: str


def read_prompts(paths: Sequence[Path]) -> list[Prompt]:
    """In the order given; the .txt and .jsonl files of a folder in the order of their names.

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
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise errors.InvalidRequest(f"cannot read prompts of {file}: {error}") from error


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
