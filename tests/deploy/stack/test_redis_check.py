"""A Redis of the user's, asked before anything starts: real servers, and some that are none.

Planted faults seen red: a ping alone, a password told on, a probe left behind, a server that says
nothing waited for without end, one that is too small for the stream passed over.
"""

from __future__ import annotations

import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from redis import Redis

from deploy.stack import redis_check
from deploy.stack.launcher import valkey_command
from deploy.stack.redis_check import check_redis
from deploy.stack.run_dir import RunDir
from proto import errors
from tests.stack import wait_for


@contextmanager
def valkey(folder: Path, *arguments: str) -> Iterator[str]:
    """The URL of a real one, for the block."""
    command = [*valkey_command(RunDir(folder)), *arguments]
    path = RunDir(folder).socket("valkey")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            wait_for(lambda: is_up(path), 10, "Valkey")
            yield f"unix://{path}"
        finally:
            server.kill()


def is_up(path: Path) -> bool:
    with suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.send(b"PING\r\n")
        return client.recv(100).startswith((b"+PONG", b"-NOAUTH"))
    return False


def refusal(url: str) -> str:
    with pytest.raises(errors.ConfigInvalid) as caught:
        check_redis(url)
    return str(caught.value)


def test_a_sound_one_is_left_as_it_was(run_dir: Path) -> None:
    with valkey(run_dir) as url:
        check_redis(url)
        with Redis.from_url(url) as client:
            assert client.keys("*") == []


@pytest.mark.parametrize(
    ("arguments", "user", "why"),
    [
        (["--requirepass", "s3cret"], "", "wants a password"),
        (["--requirepass", "s3cret"], ":wr0ng@", "wants a password"),
        (["--user", "ann", "on", ">p4ss", "~other:*", "+@all"], "ann:p4ss@", "does not permit"),
        (
            ["--user", "ann", "on", ">p4ss", "~flashmoe:*", "+@all", "-xautoclaim"],
            "ann:p4ss@",
            "does not permit",
        ),
        (["--rename-command", "XAUTOCLAIM", ""], "", "is too old: Redis 6.2"),
        (["--maxmemory", "1"], "", "is full: raise its maxmemory"),
        (["--maxmemory", "3mb"], "", "evidence alone needs 4,194,304: raise its maxmemory"),
        (["--replicaof", "127.0.0.1", "1"], "", "takes no writes: give its primary"),
        (["--min-replicas-to-write", "1"], "", "NOREPLICAS"),
    ],
)
def test_what_is_in_the_way_is_said(
    arguments: list[str], user: str, why: str, run_dir: Path
) -> None:
    with valkey(run_dir, *arguments) as url:
        said = refusal(url.replace("unix://", f"unix://{user}"))
    assert why in said and str(run_dir) in said
    assert not re.search("s3cret|wr0ng|p4ss", said), "a password is nobody's to read"


@contextmanager
def stranger(says: bytes, *, hangs_up: bool = True) -> Iterator[str]:
    """A TCP server that is no Redis."""
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    caller, _ = listener.accept()
                    kept.append(caller)
                    caller.sendall(says)
                    if hangs_up:
                        caller.close()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for caller in kept:
                caller.close()


def test_what_is_no_redis_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_check, "TIMEOUT_S", 0.3)
    with stranger(b"HTTP/1.1 400 Bad Request\r\n\r\n", hangs_up=False) as url:
        assert "is no Redis" in refusal(url)
    with stranger(b"") as url:
        assert "cannot be reached" in refusal(url)
    with stranger(b"", hangs_up=False) as url:
        assert "does not answer" in refusal(url)
    assert "cannot be reached" in refusal(url), "it has gone"


@pytest.mark.parametrize(
    "url", ["redis://h:port", "redis://[::1", "unix:///no/such.sock", "redis://:pw@127.0.0.1:1/x"]
)
def test_a_wrong_url_is_one_sentence(url: str) -> None:
    said = refusal(url)
    assert "pw" not in said and "\n" not in said
