"""`make bench`: prints every table of README, with machine, commit and what was run."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.bench import acquire, fuzz, reads, resident, restart, scheduler_load, shares
from tests.bench.table import machine

PARTS: dict[str, Callable[[Path], None]] = {
    "reads": reads.main,
    "acquire": acquire.main,
    "resident": resident.main,
    "shares": shares.main,
    "restart": restart.main,
    "scheduler": scheduler_load.main,
    "fuzz": fuzz.main,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures FlashMoE on this machine.")
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    chosen = parser.parse_args().parts
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    print(f"commit {commit}, {machine()}\n")
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="fm-bench-", dir=Path.cwd()) as folder:
            PARTS[name](Path(folder))


if __name__ == "__main__":
    main()
