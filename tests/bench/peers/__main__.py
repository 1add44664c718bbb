"""`make bench-peers`: the same weights under the same memory limit, in FlashMoE and in others.

Runs are kept as they end: called again at the same commit, it goes on where it stopped, unless
--fresh.
"""

from __future__ import annotations

import argparse
import fcntl
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.bench.peers import cgroup, disk
from tests.bench.peers.compare import agree, compare
from tests.bench.peers.contenders import CONTENDERS
from tests.bench.peers.growth import grow
from tests.bench.peers.laboratory import FOLDER, present_commit
from tests.bench.table import machine

PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "compare": compare,
    "agree": agree,
    "growth": grow,
}


def main() -> None:
    """SIGTERM unmounts and ends what runs, like the end of the program."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    chosen = _arguments()
    reason = cgroup.why_not() or disk.why_not()
    if reason:
        print(f"skipped: {reason}")
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"bench-peers: another comparison runs in {FOLDER}")
        print(f"commit {present_commit()}, {machine()}\n")
        for part in chosen.parts or PARTS:
            try:
                PARTS[part](chosen)
            except (OSError, subprocess.CalledProcessError) as error:
                sys.exit(f"bench-peers: {error}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--python", type=Path, required=True, help="of the peers' environment")
    parser.add_argument("--engines", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--shares", help="percent of the model file, or none for no limit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of four prompts")
    parser.add_argument(
        "--only-128", action="store_true", help="no runs at the disk's own read-ahead"
    )
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs")
    chosen = parser.parse_args()
    if unknown := set(chosen.parts) - PARTS.keys():
        parser.error(f"there is no part {min(unknown)!r}")
    return chosen


if __name__ == "__main__":
    main()
