"""What an acquire adds: from the node's call to tensors, against the store's own read time."""

from __future__ import annotations

import time
from pathlib import Path

from compute_node.store.borrow import StoreClient
from expert_store.offline.index import index
from expert_store.offline.pack import pack
from proto.expert import RecordKey
from tests.bench.table import percentile, show
from tests.checkpoints import make
from tests.daemons import daemon, store_table

ROUNDS = 3


def main(folder: Path) -> None:
    root = make(
        "qwen3_moe",
        folder / "model",
        hidden_size=512,
        moe_intermediate_size=1024,
        num_experts=64,
        num_hidden_layers=2,
        head_dim=64,
    )
    rows = []
    for kind, write in (("index", index), ("pack", pack)):
        write(root, folder / kind)
        run = folder / f"r{kind}"
        run.mkdir()
        rows += _measure(kind, folder / kind, run)
    show(
        "One expert of 3 MiB, one at a time, over the local socket",
        [
            "store",
            "acquire",
            "n",
            "p50 µs",
            "p99 µs",
            "read p50 µs",
            "verify p50 µs",
            "added p50 µs",
            "added p99 µs",
        ],
        rows,
    )


def _measure(kind: str, store_dir: Path, run: Path) -> list[list[object]]:
    with daemon("expert_store", run, store_table(store_dir, run, 8)) as store:
        client = StoreClient(store.address, "bench", 2, run / "sessions", 30)
        spec = client.describe().spec
        client.open()
        experts = range(spec.num_experts)
        keys = [RecordKey.exact(layer, expert) for expert in experts for layer in spec.moe_layers]
        keys *= ROUNDS
        cold = [_acquire(client, key) for key in keys]
        warm = [_acquire(client, keys[0]) for _ in range(300)]
        client.close()
    rows = []
    for name, samples in (("read", cold), ("in memory", warm)):
        total = [wall for wall, _, _ in samples]
        read = [seconds for _, seconds, _ in samples]
        verify = [seconds for _, _, seconds in samples]
        added = [wall - read_s - verify_s for wall, read_s, verify_s in samples]
        rows.append(
            [
                kind,
                name,
                len(samples),
                *(f"{percentile(total, share) * 1e6:.0f}" for share in (0.5, 0.99)),
                f"{percentile(read, 0.5) * 1e6:.0f}",
                f"{percentile(verify, 0.5) * 1e6:.0f}",
                *(f"{percentile(added, share) * 1e6:.0f}" for share in (0.5, 0.99)),
            ]
        )
    return rows


def _acquire(client: StoreClient, key: RecordKey) -> tuple[float, float, float]:
    start_s = time.perf_counter()
    [arrival] = client.exchange([], [key])
    wall_s = time.perf_counter() - start_s
    client.exchange([key], [])
    return wall_s, arrival.read_s, arrival.verify_s
