"""Why a daemon does not answer: never started, starting, stopping, killed, hanging."""

from __future__ import annotations

import socket
from enum import Enum
from pathlib import Path

from deploy.run_dir import RunDir

_LOCKS = Path("/proc/locks")


class Absence(Enum):
    """As far as the run directory tells. The value is what `status` says."""

    NO_STACK = "no stack runs here: `flashmoe serve` starts one"
    KILLED = "it was killed, or its container is down: start the stack again"
    PASSING = "the stack is starting or stopping"
    DIED = "it died and is being started again: its log may tell why"
    FORBIDDEN = "its socket belongs to another user"
    SILENT = "it takes connections and does not answer"


def find_absence(run: RunDir, name: str) -> Absence:
    """Of a daemon that did not answer. Opens a connection and says nothing on it."""
    has_launcher = is_launched(run)
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(run.socket(name)))
        except FileNotFoundError:
            return Absence.PASSING if has_launcher else Absence.NO_STACK
        except ConnectionRefusedError:
            return Absence.DIED if has_launcher else Absence.KILLED
        except PermissionError:
            return Absence.FORBIDDEN
        except OSError:  # a path too long for a socket, a folder in its place
            return Absence.NO_STACK
    return Absence.SILENT


def explain_absence(run: RunDir, absence: Absence) -> str:
    """A sentence for who wants an answer of the stack, with what to do."""
    return {
        Absence.NO_STACK: f"no stack runs in {run.path}: start one with `flashmoe serve`, or name "
        "it with --run-dir",
        Absence.KILLED: f"the stack in {run.path} was killed, or its containers are down: start it "
        "again (`flashmoe serve`)",
        Absence.PASSING: f"the stack in {run.path} is starting or stopping: wait until `flashmoe "
        "status` calls it serving, then try again",
        Absence.DIED: f"the node in {run.path} died and is started again in a moment: try again; "
        f"{run.log('compute_node')} may tell why",
        Absence.FORBIDDEN: f"the stack in {run.path} belongs to another user: run as that user",
        Absence.SILENT: f"the node in {run.path} does not answer: see `flashmoe status`",
    }[absence]


def is_launched(run: RunDir) -> bool:
    """Whether a launcher holds the run directory. Looks, and takes no lock: a launcher that starts
    now would meet it.
    """
    try:
        inode = (run.path / "lock").stat().st_ino
    except OSError:
        return False
    held = (line.split() for line in _LOCKS.read_text().splitlines())
    return any("FLOCK" in lock and any(f.endswith(f":{inode}") for f in lock) for lock in held)
