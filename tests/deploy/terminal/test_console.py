"""Errors become one sentence and a documented code, whatever the arguments and the output are.

Faults seen red: an internal error, a stderr on a full disk and a closed pipe ended with 1, which
means damage; an empty `--out` wrote into the folder one was in; escapes of an argument reached the
terminal; `generate` of bytes that are no UTF-8, and answers that the output's encoding lacks, ended
in a traceback.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from deploy import cli
from deploy.terminal import console
from proto import errors
from tests.stack import FLASHMOE, ROOT


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    said = capsys.readouterr().err
    assert said.startswith("flashmoe: ") and said.count("\n") == 1, said
    return said


def fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """The exit code when a verb raises."""

    def verb() -> None:
        raise error

    def load(name: str) -> object:
        alone = typer.Typer(add_completion=False)
        alone.command(name)(verb)
        return typer.main.get_command(alone)

    monkeypatch.setattr(cli, "load", load)
    return cli.run(["status"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ExpertDamaged("x"), 1),
        (errors.InvalidRequest("x"), 2),
        (errors.ConfigInvalid("x"), 2),
        (errors.AlreadyRunning("x"), 2),
        (PermissionError(13, "Permission denied", "/x"), 2),
        (errors.MemoryExceeded("x"), 3),
        (errors.QueueFull("x"), 3),
        (errors.StoreUnavailable("x"), 4),
        (errors.NotReady("x"), 4),
        (errors.Cancelled("x"), 4),
        (errors.FlashMoEError("x"), 70),
    ],
)
def test_kinds_have_their_codes(
    error: Exception,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fails_with(monkeypatch, error) == code
    told(capsys)


def test_a_defect_is_told_whole_and_is_no_damage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails_with(monkeypatch, ValueError("odd")) == 70
    said = capsys.readouterr().err
    assert "Traceback" in said and said.splitlines()[-1].endswith("ValueError: odd")


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (typer.Abort(), 130), (console.OutputClosed(), 141)],
)
def test_what_is_no_failure_is_silent(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fails_with(monkeypatch, error) == code
    assert capsys.readouterr().err == ""


def test_every_code_is_documented() -> None:
    for code in (0, 1, 2, 3, 4, 70, 130, 141):
        assert f" {code} " in console.EXIT_CODES


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["index", "x", "--out", ""], "--out is empty"),
        (["index", "x", "--out="], "--out is empty"),
        (["generate", "--", ""], "an argument is empty"),
        (["generate", "hi", "-5"], "goes behind --, after all options"),
        (["generate", "hi", "--seed", "-1"], "'--seed'"),
        (["generate", "hi", "--seed", str(1 << 64)], "'--seed'"),
        (["generate", "hi", "--max-tokens", "0"], "'--max-tokens'"),
        (["run", "hi", "--max-tokens", "-1"], "'--max-tokens'"),
        (["generate", "hi", "--max-tokens", str(1 << 32)], "'--max-tokens'"),
        (["generate", "hi", "--timeout", "nan"], "seconds above 0"),
        (["generate", "hi", "--timeout", "inf"], "seconds above 0"),
        (["generate", "hi", "--timeout", "-1"], "seconds above 0"),
        (["generate", "hi", "--temperature", "nan"], "'--temperature'"),
        (["generate", "hi", "--top-p", "2"], "'--top-p'"),
        (["generate", "hi", "--stop", "\udcff"], "--stop is no UTF-8"),
        (["generate", "hi\udcff"], "the prompt is no UTF-8 from byte 3 on"),
        (["run", "hi\udcff"], "the prompt is no UTF-8"),
        (["generate"], "give one prompt"),
        (["run", "hi", "--prompt-file", "x"], "give one prompt"),
        (["health", "\udcff"], "the address is no UTF-8"),
        (["plan", "x", "--memory", "1GiB", "--experts-memory", ""], "--experts-memory is empty"),
        (["generat"], "Did you mean 'generate'?"),
        (["generate", "hi", "--config", "\x1b[31m\udcff"], "\\x1b[31m\\udcff"),
    ],
)
def test_hostile_arguments_are_one_sentence(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if arguments[0] == "generate":
        arguments[1:1] = ["--run-dir", str(tmp_path)]
    assert cli.run(arguments) == 2
    assert part in told(capsys)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("flashmoe 0.")
    assert cli.run([]) == 2
    listed = capsys.readouterr()
    assert all(f" {verb} " in listed.out for verb in cli.VERBS) and listed.err == ""


def test_what_is_printed_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """Seen red: a folder named [/v1] ended `verify` in a traceback, :cat: became a picture."""
    for name in ("/models/[/v1]/x", "/models/[red]/x", ":cat:"):
        console.out.print(name)
        console.say(name)
        assert capsys.readouterr() == (f"{name}\n", f"{name}\n")


def shell(command: str, **environ: str) -> subprocess.CompletedProcess[bytes]:
    flashmoe = " ".join(FLASHMOE)
    return subprocess.run(
        ["bash", "-c", command.replace("flashmoe", flashmoe, 1)],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
    )


def test_a_closed_pipe_is_neither_damage_nor_a_traceback(tmp_path: Path) -> None:
    """Of what rich prints, of what we write, and of typer's help."""
    for verb in (f"status --run-dir {tmp_path}", f"status --json --run-dir {tmp_path}", "--help"):
        done = shell(f"flashmoe {verb} | head -c 0; exit ${{PIPESTATUS[0]}}")
        assert (done.returncode, done.stderr) == (141, b""), verb


def test_an_encoding_that_lacks_a_character_keeps_its_code(tmp_path: Path) -> None:
    write = (
        "from deploy.terminal import console;"
        "console.prepare_output(); console.write('caf\\u00e9\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", write],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert (done.returncode, done.stdout) == (0, b"caf\\xe9\n"), done.stderr


def test_a_stderr_that_cannot_be_written_changes_no_code() -> None:
    assert shell("flashmoe generate hi --bogus 2>/dev/full").returncode == 2
