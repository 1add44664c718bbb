"""Which thread the daemon's wiring gives its cache to.

Planted fault seen red: the cache opened on the event loop's thread, while the idle hook of the
compute thread may let go of what it holds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemons import daemon, node_table, store_table

# In a process of its own: the daemon's imports replace modules of torch.
WATCH = """
import sys, json, asyncio, threading
from compute_node import __main__ as node

owners = {}

def watched(name):
    method = getattr(node.ExpertCache, name)
    def call(self, *args, **kwargs):
        owners.setdefault(name, []).append(threading.current_thread().name)
        return method(self, *args, **kwargs)
    setattr(node.ExpertCache, name, call)

for name in ("open", "let_go_if_lost"):
    watched(name)

async def until_idle():
    while len(owners.get("let_go_if_lost", ())) < 2:
        await asyncio.sleep(0.05)

node.rpc.until_signalled = until_idle
asyncio.run(node.run(node.ComputeNodeConfig(**json.loads(sys.argv[1]))))
print(json.dumps(owners))
"""


@pytest.mark.system
def test_one_thread_owns_the_cache(tiny_store: Path, run_dir: Path) -> None:
    """It opens the cache and is idle with it; it computes as well, as all jobs do."""
    with daemon("expert_store", run_dir, store_table(tiny_store, run_dir, 70)):
        table = json.dumps(node_table(run_dir, "n", 64))
        done = subprocess.run(
            [sys.executable, "-c", WATCH, table], capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr[-2000:]
    owners = json.loads(done.stdout)
    assert set(owners["open"]) == set(owners["let_go_if_lost"]) == {"compute"}
