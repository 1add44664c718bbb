"""A client's connection to a stack, and why a daemon does not answer: never started, starting,
stopping, killed, hanging.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from compute_node.client.node_client import NodeClient
from deploy.stack.run_dir import RunDir, RunState
from proto import errors


class Absence(Enum):
    """The reasons that the run directory shows. The value is what `status` prints."""

    NO_STACK = "no stack runs here: `flashmoe serve` starts one"
    KILLED = "it was killed, or its container is down: start the stack again"
    STARTING = "the stack is starting"
    STOPPING = "the stack is stopping"
    DIED = "it died and is being started again: its log may say why"
    FORBIDDEN = "its socket belongs to another user"
    SILENT = "it takes connections and does not answer"


_WITHOUT_SOCKET = {
    RunState.ABSENT: Absence.NO_STACK,
    RunState.STARTING: Absence.STARTING,
    RunState.SERVING: Absence.DIED,
    RunState.STOPPING: Absence.STOPPING,
}


def find_absence(run: RunDir, name: str) -> Absence:
    """Why a daemon did not answer. Opens a connection and sends nothing over it."""
    try:
        state = run.state()
    except OSError:  # no folder that a stack could live in
        return Absence.NO_STACK
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(run.socket(name)))
        except FileNotFoundError:
            return _WITHOUT_SOCKET[state]
        except ConnectionRefusedError:
            return Absence.KILLED if state is RunState.ABSENT else _WITHOUT_SOCKET[state]
        except PermissionError:
            return Absence.FORBIDDEN
        except OSError:  # a path too long for a socket, a folder in its place
            return Absence.NO_STACK
    return Absence.SILENT


def explain_absence(run: RunDir, absence: Absence) -> str:
    """One sentence for a user of the stack: why it does not answer, and what to do."""
    return {
        Absence.NO_STACK: f"no stack runs in {run.path}: start one with `flashmoe serve`, or name "
        "it with --run-dir",
        Absence.KILLED: f"the stack in {run.path} was killed, or its containers are down: start it "
        "again (`flashmoe serve`)",
        Absence.STARTING: f"the stack in {run.path} is starting: try again once `flashmoe serve` "
        "says that it is ready",
        Absence.STOPPING: f"the stack in {run.path} is stopping: start it again once it has "
        "stopped",
        Absence.DIED: f"the node in {run.path} died and is started again in a moment: try again; "
        f"{run.log('compute_node')} may say why",
        Absence.FORBIDDEN: f"the stack in {run.path} belongs to another user: run as that user",
        Absence.SILENT: f"the node in {run.path} does not answer: see `flashmoe status`",
    }[absence]


@contextmanager
def connected(run: RunDir) -> Iterator[NodeClient]:
    """A client of the stack in `run`, for the block.

    Raises Unavailable with the reason when the stack does not answer, or stops answering.
    """
    absence = find_absence(run, "compute_node")
    if absence is not Absence.SILENT:
        raise errors.Unavailable(explain_absence(run, absence))
    with NodeClient(run.address("compute_node")) as node:
        try:
            yield node
        except errors.Unavailable as error:
            absence = find_absence(run, "compute_node")
            if absence is Absence.SILENT:  # it is there: the error is its own
                raise
            raise errors.Unavailable(
                f"the node went away while it answered: {explain_absence(run, absence)}"
            ) from error
