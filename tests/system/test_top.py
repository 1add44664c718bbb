"""`flashmoe top` of a running stack, printed once and live on a terminal.

Planted faults seen red: Ctrl-C ends it with 130, a stack that is not there is drawn empty, it
draws into a file.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
from pathlib import Path

import pytest

from tests.stack import FLASHMOE, ROOT, answering, flashmoe, served, wait_for

pytestmark = pytest.mark.system


def test_a_frame_has_the_figures_of_what_runs(tiny_store: Path, run_dir: Path) -> None:
    with served(tiny_store, run_dir) as stack, answering(stack, 400):
        wait_for(lambda: stack.status()["compute_node"]["stats"]["generated_tokens"], 20, "tokens")
        once = flashmoe("top", "--once", "--run-dir", str(run_dir))
        assert once.returncode == 0, once.stderr
        for part in ("tokens/s", "1 open", "in charge", "layer x expert", "█"):
            assert part in once.stdout
        assert "away" not in once.stdout
        into_file = flashmoe("top", "--run-dir", str(run_dir), timeout_s=20)
        assert into_file.returncode == 2 and "give --once" in into_file.stderr
        live_until_ctrl_c(run_dir)
    gone = flashmoe("top", "--once", "--run-dir", str(run_dir))
    assert gone.returncode == 4 and "flashmoe serve" in gone.stderr


def live_until_ctrl_c(run_dir: Path) -> None:
    """It draws on a terminal, gives its old content back, and ends with 0."""
    reader, terminal = pty.openpty()
    process = subprocess.Popen(
        [*FLASHMOE, "top", "--run-dir", str(run_dir)],
        cwd=ROOT,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
        start_new_session=True,
    )
    os.close(terminal)
    drawn = bytearray()

    def drew_twice() -> bool:
        drawn.extend(os.read(reader, 65536))
        return drawn.count(b"layer x expert") >= 2

    try:
        wait_for(drew_twice, 20, "two frames")
        process.send_signal(signal.SIGINT)
        with os.fdopen(reader, "rb", 0) as rest:
            drain(rest.fileno(), drawn)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
    assert drawn.rstrip().endswith((b"\x1b[?1049l\x1b[?25h", b"\x1b[?25h\x1b[?1049l")), drawn[-80:]


def drain(descriptor: int, into: bytearray) -> None:
    """Until the program closes its terminal, which Linux reports as an error."""
    try:
        while part := os.read(descriptor, 65536):
            into.extend(part)
    except OSError:
        return
