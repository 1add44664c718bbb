"""What Ray's head keeps survives the head, and others cannot read it.

Planted faults seen red: see the test.
"""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
from pathlib import Path

import redis

from tests.ports import free_port
from tests.stack import ROOT, wait_for

HEAD = """
import sys, time
from pathlib import Path
from deploy.cluster.head_state import HeadState
HeadState(Path(sys.argv[1]), int(sys.argv[2])).start()
print("ready", flush=True)
time.sleep(600)
"""


def test_what_a_head_knows_survives_its_end(tmp_path: Path) -> None:
    """Seen red: without `appendonly`, and without the signal at the parent's end."""
    port = free_port()
    for number in range(2):
        head = subprocess.Popen(
            [sys.executable, "-c", HEAD, str(tmp_path / "head"), str(port)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        try:
            assert head.stdout and head.stdout.readline() == b"ready\n"
            password = (tmp_path / "head/password").read_text()
            with redis.Redis(port=port, password=password) as client:
                assert client.get("boxes") == (b"3" if number else None)
                client.set("boxes", "3")
            with redis.Redis(port=port) as stranger:
                assert is_refused(stranger)
        finally:
            head.kill()
            head.wait()
            assert head.stdout
            head.stdout.close()
        wait_for(lambda: not answers(port), 20, "the head's Valkey to end with it")
    for name in ("password", "valkey.conf"):
        assert stat.S_IMODE((tmp_path / "head" / name).stat().st_mode) == 0o600


def is_refused(client: redis.Redis) -> bool:
    try:
        client.get("boxes")
    except redis.AuthenticationError:
        return True
    return False


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
