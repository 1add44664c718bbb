"""Daemons killed at random moments under HTTP load, in turn: every stream equals its undisturbed
text, or ends with an error that a client understands, and nothing leaks.

    python -m tests.bench.http_kills [KILLS OF EACH] [SEED]
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import psutil

from expert_store.offline.index import index
from tests.bench.http_load import Outcomes, load, undisturbed
from tests.bench.table import machine, show
from tests.ports import free_port
from tests.stack import MODEL, ServedStack, served, wait_for

VICTIMS = ("compute_node", "gateway", "expert_store")
CONNECTIONS = 8
_MOST_WAIT_S = 6.0  # between two kills; the supervisor restarts a daemon five times a minute
_BACK_S = 60.0


def killed(stack: ServedStack, kills_each: int, seed: int) -> tuple[Outcomes, list[float]]:
    """Streams meanwhile, and seconds from each kill until requests are taken again."""
    expected, over, dice = undisturbed(stack), threading.Event(), random.Random(seed)
    back_s = []
    with ThreadPoolExecutor(1) as other:
        loading = other.submit(
            lambda: asyncio.run(load(stack.url, expected, over, CONNECTIONS, may_break=True))
        )
        try:
            for victim in VICTIMS * kills_each:
                time.sleep(dice.uniform(0.2, _MOST_WAIT_S))
                stack.kill(victim)
                since_s = time.monotonic()
                wait_for(lambda: takes_requests(stack), _BACK_S, f"requests after {victim}'s end")
                back_s.append(time.monotonic() - since_s)
            time.sleep(2)
        finally:
            over.set()
    return loading.result(), back_s


def takes_requests(stack: ServedStack) -> bool:
    with suppress(OSError, LookupError, HTTPException):
        for name in VICTIMS:
            stack.pid(name)
        with urllib.request.urlopen(f"{stack.url}/health/ready", timeout=5) as reply:
            return bool(reply.status == 200)
    return False


def leftovers(stack: ServedStack) -> dict[str, int]:
    """What may not grow: descriptors, shared memory, and what nobody has given back."""
    with stack.client() as node:
        stats = node.stats()
    store = stack.status()["expert_store"]
    own = [psutil.Process(stack.pid(name)) for name in VICTIMS] + [stack.launcher]
    return {
        "descriptors": sum(process.num_fds() for process in own),
        "files in /dev/shm": len(list(Path("/dev/shm").iterdir())),
        "slots filling": store["slots_filling"],
        "slots leased beyond the node's": store["slots_leased"] - stats.resident,
        "sessions": store["sessions"] + store["orphaned_sessions"],
        "requests alive or queued": stats.live + stats.queued,
        "bytes reserved": stats.reserved_bytes,
    }


def main(kills_each: int = 5, seed: int = 1) -> None:
    with tempfile.TemporaryDirectory(prefix="fm-") as folder:
        store, run = Path(folder) / "tiny-moe", Path(folder) / "run"
        index(MODEL, store)
        flags = ["--http", str(free_port()), "--experts-memory=100%"]
        with served(store, run, *flags) as stack:
            asyncio.run(load(stack.url, undisturbed(stack), 3.0, CONNECTIONS))
            time.sleep(2)
            before = leftovers(stack)
            outcomes, back_s = killed(stack, kills_each, seed)
            time.sleep(2)
            after = leftovers(stack)
    rows = [[kind, str(num)] for kind, num in outcomes.by_kind.most_common()]
    rows += [["wrong", str(outcomes.wrong[:3])]]
    rows += [["seconds until back, longest", f"{max(back_s):.1f}"]]
    rows += [[f"{name} before, after", f"{before[name]}, {after[name]}"] for name in before]
    title = f"HTTP under kills: {kills_each} each of {', '.join(VICTIMS)}; seed {seed}; {machine()}"
    show(title, ["streams", "number"], rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
