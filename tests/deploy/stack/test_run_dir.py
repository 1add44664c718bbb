"""A run directory says what becomes of its stack, and one that cannot be used says why.

Planted faults seen red: the state believed without its lock, a longer state left behind a shorter
one, no look at who owns the folder or what is free there, characters counted for bytes, the longest
socket forgotten, Valkey's socket put into a URL as it is.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from deploy import settings
from deploy.stack.run_dir import RunDir, RunState
from proto import errors
from tests.expert_store.conftest import SmallDisk, small_disk  # noqa: F401  a fixture
from tests.stack import FLASHMOE, ROOT


def test_a_client_can_tell_starting_serving_stopping_and_absent(run_dir: Path) -> None:
    run = RunDir(run_dir)
    assert run.state() is RunState.ABSENT
    with run.claimed() as claim:
        assert run.state() is RunState.STARTING
        for state in (RunState.SERVING, RunState.STOPPING, RunState.SERVING):
            claim.publish(state)
            assert run.state() is state
        with pytest.raises(errors.AlreadyRunning, match="give another --run-dir"), run.claimed():
            pass
    assert run.state() is RunState.ABSENT, "a killed launcher leaves its last word, not its lock"
    with run.claimed():
        assert run.state() is RunState.STARTING


@pytest.mark.parametrize(
    ("told", "sentence"),
    [(RunState.STARTING, "is starting"), (RunState.STOPPING, "is stopping")],
)
def test_generate_says_what_the_stack_is_at(told: RunState, sentence: str, run_dir: Path) -> None:
    """Red before: `no stack runs in ...: start one`."""
    with RunDir(run_dir.resolve()).claimed() as claim:
        claim.publish(told)
        command = [*FLASHMOE, "generate", "x", "--run-dir", str(run_dir)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    assert sentence in done.stderr and "start one" not in done.stderr


def a_file(path: Path) -> Path:
    (path / "file").touch()
    return path / "file"


def in_a_file(path: Path) -> Path:
    return a_file(path) / "run"


def homeless(path: Path) -> Path:
    return path / "~" / "run"


def of_another(path: Path) -> Path:
    if os.geteuid():
        pytest.skip("giving a folder to another user takes root")
    os.chown(path, 12345, 12345)
    return path


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (a_file, "it is no folder"),
        (in_a_file, "Not a directory"),
        (homeless, "write the path in full"),
        (of_another, "belongs to the user with the id 12345"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(
    make: Callable[[Path], Path], sentence: str, run_dir: Path
) -> None:
    with pytest.raises(errors.ConfigInvalid, match=sentence):
        RunDir(make(run_dir)).prepare()


def test_one_that_cannot_be_written_is_refused(
    small_disk: SmallDisk,  # noqa: F811
) -> None:
    small_disk.resize(4 << 20)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk.path)], check=True)
    run = RunDir(small_disk.path)
    run.prepare()
    with pytest.raises(errors.ConfigInvalid, match=r"\(Read-only file system\)"), run.claimed():
        pass


def test_a_full_disk_is_refused_by_name(
    small_disk: SmallDisk,  # noqa: F811
) -> None:
    """Red before: `[Errno 28] No space left on device`, of nobody knew which."""
    with pytest.raises(errors.ConfigInvalid, match=r"the disk of --run-dir .* is full"):
        RunDir(small_disk.path).prepare()
    small_disk.resize(4 << 20)
    RunDir(small_disk.path).prepare()


def test_without_a_home_no_command_fails_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red before: RuntimeError from the import, `--help` included."""

    def expanduser(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", expanduser)
    path = settings._default_run_dir()
    with pytest.raises(errors.ConfigInvalid, match="HOME is not set"):
        RunDir(path.resolve()).prepare()


def of_bytes(folder: Path, num_bytes: int, letter: str) -> Path:
    """A path below `folder` of so many bytes."""
    letters, rest = divmod(num_bytes - len(os.fsencode(folder)) - 1, len(letter.encode()))
    return folder / ("x" * rest + letter * letters)


@pytest.mark.parametrize("letter", ["x", "é", "漢"])
def test_the_longest_path_that_works(letter: str, run_dir: Path) -> None:
    """107 bytes for a socket, of which the store's local socket takes 23."""
    run = RunDir(of_bytes(run_dir, 84, letter))
    run.prepare()
    (run.path / "sessions").mkdir()
    for path in (run.socket("compute_node"), run.path / "sessions/exchange.sock"):
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    longer = RunDir(of_bytes(run_dir, 85, letter))
    with pytest.raises(errors.ConfigInvalid, match="at most 84 bytes"):
        longer.prepare()
    assert not longer.path.exists()


@pytest.mark.parametrize(("name", "named"), [("a,b", "comma"), (os.fsdecode(b"\xff"), r"\\xff")])
def test_what_cannot_be_addressed_is_refused(name: str, named: str, run_dir: Path) -> None:
    with pytest.raises(errors.ConfigInvalid, match=named) as caught:
        RunDir(run_dir / name).prepare()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["#", "?", "%20", "a b", "é漢字", "@:", "\t"])
def test_valkey_is_addressed_where_it_is(name: str) -> None:
    run = RunDir(Path("/run") / name)
    client = redis.Redis.from_url(run.redis_url)
    assert client.connection_pool.connection_kwargs["path"] == f"/run/{name}/valkey.sock"
