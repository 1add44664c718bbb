"""A stack without Ray around it: nobody's child, found again, replaced, ended, swept."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from deploy.cluster.box_stack import BoxStack, wait_for_end
from deploy.cluster.order import Order
from deploy.stack.run_dir import RunDir, RunState
from tests.stack import wait_for


@pytest.mark.system
def test_a_stack_is_adopted_replaced_and_swept(tiny_store: Path, run_dir: Path) -> None:
    run = RunDir(run_dir.resolve())
    first, second = order(tiny_store, run, "25%"), order(tiny_store, run, "50%")
    pid = BoxStack(run, os.environ).bring_about(first)
    try:
        wait_for(lambda: run.state() is RunState.SERVING, 240, "the stack to serve")
        assert psutil.Process(pid).ppid() != os.getpid()
        finder = BoxStack(run, os.environ)
        assert finder.bring_about(first) == finder.launcher_pid == pid
        replaced = finder.bring_about(second)
        assert replaced != pid and wait_for_end(pid, 0.0)
        wait_for(lambda: run.state() is RunState.SERVING, 240, "the other stack to serve")
        assert "50%" in (run.path / "box.toml").read_text()
        os.kill(replaced, signal.SIGKILL)
        assert wait_for_end(replaced, 60)
    finally:
        BoxStack(run, os.environ).stop()
    assert not run.segment.exists() and not run.presence.exists()
    assert BoxStack(run, os.environ).stop() is False


def order(store: Path, run: RunDir, experts_memory: str) -> Order:
    served = {"model": str(store), "run_dir": str(run.path), "experts_memory": experts_memory}
    return Order("w1", "worker", str(run.path), {"serve": served | {"listen": "127.0.0.1:0"}})


def test_the_end_of_any_process_can_be_awaited() -> None:
    assert not wait_for_end(os.getpid(), 0.01)
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert wait_for_end(child, 10)
    os.waitpid(child, 0)
    assert wait_for_end(child, 10)
