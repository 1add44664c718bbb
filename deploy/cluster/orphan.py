"""Starts a command that outlives who asked for it: `python -m deploy.cluster.orphan LOG COMMAND`.

Ray ends the children of an actor that ends; a stack is nobody's child.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def start(log: Path, command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Start it in a session of its own; what it prints goes to the end of the log. Returns its
    process id. Raises OSError, CalledProcessError.
    """
    starter = [sys.executable, "-m", "deploy.cluster.orphan", str(log), *command]
    started = subprocess.run(
        starter, env=dict(environment), check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    return int(started.stdout)


def main(log: str, *command: str) -> None:
    with Path(log).open("ab") as said:
        started = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
            cwd="/",
        )
    sys.stdout.write(str(started.pid))
    started.returncode = 0  # it is not ours to wait for


if __name__ == "__main__":
    main(*sys.argv[1:])
