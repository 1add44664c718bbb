"""What a run directory may be called, and what is refused before anything starts.

Planted faults seen red: characters counted for bytes, the longest socket forgotten, Valkey's socket
put into a URL as it is.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import redis

from deploy.run_dir import RunDir
from proto import errors


def of_bytes(folder: Path, num_bytes: int, letter: str) -> Path:
    """A path below `folder` of so many bytes."""
    letters, rest = divmod(num_bytes - len(os.fsencode(folder)) - 1, len(letter.encode()))
    return folder / ("x" * rest + letter * letters)


@pytest.mark.parametrize("letter", ["x", "é", "漢"])
def test_the_longest_path_that_works(letter: str, run_dir: Path) -> None:
    """107 bytes for a socket, of which the store's doorbell takes 23."""
    run = RunDir(of_bytes(run_dir, 84, letter))
    run.prepare()
    (run.path / "sessions").mkdir()
    for path in (run.socket("compute_node"), run.path / "sessions/doorbell.sock"):
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
