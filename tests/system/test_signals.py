"""Ctrl-C and a closed terminal, as a shell delivers them: to the whole process group.

Fault: daemons in the launcher's process group all stop at once, and the request fails.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.stack.run_dir import RunDir
from tests.stack import FLASHMOE, ROOT, assert_nothing_left, served, wait_for

pytestmark = pytest.mark.system


@pytest.fixture(autouse=True)
def hang_ups_heard() -> Iterator[None]:
    """Also where the tests themselves were started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_group_signal_drains_in_order(number: int, tiny_store: Path, run_dir: Path) -> None:
    """The request in flight is finished, the launcher ends with 0, nothing is left."""
    with served(tiny_store, run_dir, command=["setsid", "--wait", *FLASHMOE]) as stack:
        children = stack.launcher.children(recursive=True)
        with stack.client() as node:
            generation = node.generate("In the beginning", max_tokens=120, ignore_eos=True)
            pieces = iter(generation)
            next(pieces)
            os.killpg(stack.launcher.pid, number)
            for _ in pieces:
                pass
            assert generation.result is not None
            assert len(generation.result.token_ids) == 120
        assert stack.process.wait(60) == 0
        assert_nothing_left(stack.run, children)


def test_signal_during_start_stops_the_start(tiny_store: Path, run_dir: Path) -> None:
    """Fault: a start loop that never looks at the flag goes on to `ready`."""
    flags = ["--model", str(tiny_store), "--experts-memory", "96", "--run-dir", str(run_dir)]
    process = subprocess.Popen(
        [*FLASHMOE, "serve", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = RunDir(run_dir.resolve())
    wait_for(lambda: run.log("compute_node").exists(), 30, "the node to be started")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "ready" not in out and "stopped" in err
    assert_nothing_left(run, [])
