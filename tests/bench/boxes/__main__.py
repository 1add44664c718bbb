"""`python -m tests.bench.boxes PART`: what several boxes give, on one machine (tests/boxlab)."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable
from functools import partial

from tests.bench.boxes import borrowed, kill, memory, overhead, owned, rotation, simulator
from tests.bench.table import machine
from tests.boxlab.laboratory import why_not

PARTS: dict[str, Callable[[], None]] = {
    "owned": owned.main,
    "borrowed": borrowed.main,
    "overhead": overhead.main,
    "kill": kill.main,
    "memory": memory.main,
    "rotation": rotation.main,
    "simulator-inputs": simulator.measure_inputs,
    "simulator": partial(simulator.check, simulator.OWNED),
    "simulator-others": partial(simulator.check, simulator.OTHERS),
    "simulator-unseen": partial(simulator.check, simulator.UNSEEN),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    chosen = parser.parse_args().parts
    if reason := why_not():
        raise SystemExit(f"there can be no boxes here: {reason}")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    print(f"commit {commit}, {machine()}\n")
    for name in chosen:
        PARTS[name]()


if __name__ == "__main__":
    main()
