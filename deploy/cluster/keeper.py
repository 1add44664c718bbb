"""The actor of a box: keeps its stack running. Ray keeps the actor."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from deploy.cluster.box_stack import BoxStack, wait_for_end
from deploy.cluster.order import Order
from deploy.cluster.ray_processes import environment_of_raylet, ray_pss_bytes
from deploy.stack.run_dir import RunDir, RunState
from proto import errors

_LOOK_S = 0.3
_PAUSE_S = 1.0  # between the end of a stack and the start of the next
_STATUS_S = 60.0
_LOST = 1


class Keeper:
    """Adopts the stack of the box or starts it. When a stack that had served ends, the actor ends
    too and Ray makes it anew. A stack that refuses to start is left, and why is kept.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._run = RunDir(Path(order.run_dir).expanduser().resolve())
        self._environment = environment_of_raylet()
        self._stack = BoxStack(self._run, self._environment)
        self._stopping = threading.Event()
        self._failure = ""
        self._thread = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._thread.start()

    def order(self) -> Order:
        return self._order

    def state(self) -> dict[str, str]:
        """state: as of the run directory, or `failed`; reason: of the failure"""
        if self._failure:
            return {"state": "failed", "reason": self._failure}
        return {"state": self._stack.state.value, "reason": ""}

    def report(self) -> dict[str, Any]:
        """The state, what every daemon says of itself, and the memory of Ray here."""
        command = [sys.executable, "-m", "deploy.cli", "status", "--json"]
        asked = subprocess.run(
            [*command, "--run-dir", str(self._run.path)],
            env=self._environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=_STATUS_S,
        )
        return self.state() | {"status": asked.stdout, "ray_bytes": ray_pss_bytes()}

    def stop(self) -> bool:
        """End the stack, and leave nothing of it. Returns whether one ran. Raises AlreadyRunning
        when it does not end.
        """
        self._stopping.set()
        return self._stack.stop()

    def _keep(self) -> None:
        try:
            pid: int | None = self._stack.bring_about(self._order)
        except (errors.FlashMoEError, OSError, subprocess.SubprocessError) as error:
            self._failure = str(error)
            return
        has_served = False
        while pid is not None:
            while not wait_for_end(pid, _LOOK_S):
                has_served = has_served or self._stack.state is RunState.SERVING
            pid = self._stack.launcher_pid
        if self._stopping.is_set():
            return
        if not has_served:
            self._failure = self._stack.last_words()
            return
        time.sleep(_PAUSE_S)
        os._exit(_LOST)
