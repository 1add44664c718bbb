"""One prompt of a command line: argument, file or standard input.

Faults seen red: a byte order mark and the last line break became tokens; a file without end filled
the memory; bytes of the command line that are no UTF-8 ended in a traceback.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from deploy.terminal import prompts
from deploy.terminal.prompts import as_text, choose_prompt
from proto import errors


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"Once upon a time\n", "Once upon a time"),
        (b"two\nlines\r\n", "two\nlines"),
        (b"\xef\xbb\xbfcaf\xc3\xa9", "café"),
        (b"kept \n\n", "kept \n"),
        (b" ", " "),
    ],
)
def test_file_and_standard_input_give_their_text(
    data: bytes, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(data)
    assert choose_prompt(None, file) == text
    for argument, path in (("-", None), (None, Path("-"))):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "ascii"))
        assert choose_prompt(argument, path) == text


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"caf\xe9", "no UTF-8 from byte 4"),
        (b"x" * 9, "MiB"),
    ],
)
def test_what_is_no_prompt_is_refused(
    data: bytes, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "_MOST_BYTES", 8)
    file = tmp_path / "prompt.txt"
    file.write_bytes(data)
    with pytest.raises(errors.InvalidRequest, match=part):
        choose_prompt(None, file)


def test_a_folder_a_missing_file_and_a_closed_standard_input_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(errors.InvalidRequest, match="Is a directory"):
        choose_prompt(None, tmp_path)
    with pytest.raises(errors.InvalidRequest, match=r"nowhere: No such file"):
        choose_prompt(None, tmp_path / "nowhere")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(errors.InvalidRequest, match="standard input is closed"):
        choose_prompt("-", None)


def test_an_argument_that_the_locale_does_not_know_is_still_utf8() -> None:
    """As Python hands over UTF-8 where the locale is ascii."""
    assert as_text("caf\udcc3\udca9", "the prompt") == "café"
