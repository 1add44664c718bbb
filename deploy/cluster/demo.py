"""Three boxes on this machine generate, one of them is killed, and the text is that of one box:
`make cluster-demo`. Leaves nothing behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import tomli_w

from compute_node.client.node_client import NodeClient
from deploy.cluster.box_stack import BoxStack, wait_for_end
from deploy.cluster.ray_start import LOCK_NAME
from deploy.stack import locks
from deploy.stack.launcher import own_stack
from deploy.stack.run_dir import RunDir
from deploy.terminal import console
from deploy.terminal.signals import stop_flag

_PROMPT, _TOKENS, _KILL_AFTER = "In the beginning God created", 96, 32
_MAIN, _KEPT, _KILLED = "main", "attic", "cellar"
_HOSTS = {_MAIN: "127.0.0.2", _KEPT: "127.0.0.3", _KILLED: "127.0.0.4"}
_PORTS = {_KEPT: 9471, _KILLED: 9472}
_SHARE = "25%"  # of the experts in each box's memory
_END_S = 20.0


def main(store: str) -> int:
    """Returns 0 when all texts are the same."""
    with tempfile.TemporaryDirectory(prefix="fm-demo-") as scratch:
        folder = Path(scratch).resolve()
        file = _write_cluster(folder, Path(store).resolve())
        console.out.print(f"One box, {_SHARE} of the experts in memory:\n")
        flags = {"model": Path(store), "experts_memory": _SHARE}
        with own_stack(None, flags, stop_flag()) as (_, run):
            texts = [_generated(run)]
        with _cluster(file, folder):
            run = RunDir(folder / _MAIN)
            console.out.print(f"\nThree boxes, {_SHARE} each; {_KILLED} is killed meanwhile:\n")
            texts.append(_generated(run, lambda: _kill(folder / _KILLED)))
            console.out.print()
            _cluster_verb("status", file, is_expected_to_fail=True)
            console.out.print(f"\n{_KILLED} comes back, and the same question again:\n")
            _cluster_verb("up", file)
            texts.append(_generated(run))
            console.out.print()
    is_same = len(set(texts)) == 1
    console.out.print(f"The text of one box each time: {'yes' if is_same else 'NO'}")
    return 0 if is_same else 1


def _write_cluster(folder: Path, store: Path) -> Path:
    boxes = [
        {
            "name": name,
            "host": host,
            "memory": "2GiB" if name == _MAIN else "1200MiB",
            "experts_memory": _SHARE,
            "run_dir": str(folder / name),
        }
        | ({"port": _PORTS[name]} if name in _PORTS else {})
        for name, host in _HOSTS.items()
    ]
    document = {
        "model": str(store),
        "ray": "local",
        "head": {"state_dir": str(folder / "head")},
        "main": boxes[0],
        "worker": boxes[1:],
    }
    file = folder / "cluster.toml"
    file.write_text(tomli_w.dumps(document))
    return file


@contextmanager
def _cluster(file: Path, folder: Path) -> Iterator[None]:
    """Up for the block. Ray's own files are in the folder, too."""
    os.environ["RAY_TMPDIR"] = str(folder)
    try:
        _cluster_verb("up", file)
        yield
    finally:
        _cluster_verb("down", file)


def _cluster_verb(verb: str, file: Path, is_expected_to_fail: bool = False) -> None:
    words = [sys.executable, "-m", "deploy.cli", "cluster", verb, str(file)]
    subprocess.run(words, check=not is_expected_to_fail)


def _generated(run: RunDir, at_token: Callable[[], None] = lambda: None) -> str:
    """The text, shown while it comes. at_token: called once, in its middle"""
    text, num_tokens = "", 0
    with NodeClient(run.address("compute_node")) as node:
        for piece in node.generate(_PROMPT, max_tokens=_TOKENS, ignore_eos=True):
            text, num_tokens = text + piece.text, num_tokens + 1
            console.write(piece.text)
            if num_tokens == _KILL_AFTER:
                at_token()
    console.write("\n")
    return text


def _kill(run_dir: Path) -> None:
    """The power of the box fails: its daemons and its Ray end at once."""
    pids = [BoxStack(RunDir(run_dir), os.environ).launcher_pid, *locks.holders(run_dir / LOCK_NAME)]
    found = [psutil.Process(pid) for pid in pids if pid is not None]
    dying = [one for process in found for one in (*process.children(recursive=True), process)]
    for process in dying:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    for process in dying:
        wait_for_end(process.pid, _END_S)
    console.write(f" <{run_dir.name} is killed> ")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
