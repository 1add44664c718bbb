"""Several clients at once: what each part of the machine gives them, on the widened model.

python -m tests.bench.clients PART... --python .flashmoe/peers-venv/bin/python
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.bench.clients.engines import ENGINES
from tests.bench.clients.http_cost import http_cost
from tests.bench.clients.second_turn import second_turn
from tests.bench.clients.stall import stall
from tests.bench.clients.together import together
from tests.bench.peers import cgroup, disk

PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "together": together,
    "stall": stall,
    "second-turn": second_turn,
    "http": http_cost,
}


def main() -> None:
    chosen = _arguments()
    if reason := cgroup.why_not() or disk.why_not():
        print(f"skipped: {reason}")
        return
    for part in chosen.parts or PARTS:
        try:
            PARTS[part](chosen)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"bench.clients: {error}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--python", type=Path, required=True, help="of the peers' environment")
    parser.add_argument("--engines", nargs="+", default=["FlashMoE lossless"], choices=ENGINES)
    parser.add_argument("--shares", nargs="+", type=_share, default=[37.5], help="percent, or none")
    parser.add_argument("--clients", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--tokens", type=int, default=160, help="of each answer")
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args()
    if unknown := set(chosen.parts) - PARTS.keys():
        parser.error(f"there is no part {min(unknown)!r}")
    return chosen


def _share(text: str) -> float | None:
    return None if text == "none" else float(text)


if __name__ == "__main__":
    main()
