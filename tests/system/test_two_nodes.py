"""Two nodes on one store: one copy of an expert, one read of it, and no slot lost or torn.

Planted fault seen red: a store that gives leases back when the stream breaks, without asking the
lock.
"""

from __future__ import annotations

import mmap
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from compute_node.client.node_client import NodeClient
from expert_store.manifest.manifest import Manifest
from proto import errors, shm
from tests.daemons import (
    CuttableProxy,
    DaemonProcess,
    daemon,
    is_store_idle,
    node_table,
    store_stats,
    store_table,
)
from tests.stack import wait_for

pytestmark = pytest.mark.system
PROMPTS = ("In the beginning God created", "def __init__(self, name):")


@contextmanager
def stack(
    store_dir: Path, run_dir: Path, slots: tuple[int, int], num_slots: int, proxied: bool = False
) -> Iterator[tuple[DaemonProcess, list[DaemonProcess], CuttableProxy | None]]:
    with ExitStack() as entered:
        store = entered.enter_context(
            daemon("expert_store", run_dir, store_table(store_dir, run_dir, num_slots))
        )
        proxy, more = None, {}
        if proxied:
            proxy = CuttableProxy(run_dir / "proxy.sock", run_dir / "store.sock")
            entered.callback(proxy.close)
            more = {"store_address": f"unix:{run_dir}/proxy.sock"}
        tables = [node_table(run_dir, "a", slots[0], **more), node_table(run_dir, "b", slots[1])]
        nodes = [
            entered.enter_context(daemon("compute_node", run_dir, table, table["node"]))
            for table in tables
        ]
        yield store, nodes, proxy
        for node in nodes:
            if node.process.poll() is None:
                assert node.stop() == 0, node.log.read_text()[-2000:]
        wait_for(lambda: is_store_idle(store.address), 20, "every lease to come back")


def generate(address: str, prompt: str, tokens: int = 48) -> list[int]:
    with NodeClient(address) as client:
        options = {"max_tokens": tokens, "ignore_eos": True, "timeout_s": 90.0}
        return client.generate(prompt, **options).run().token_ids  # type: ignore[arg-type]


def test_share_one_copy_and_one_read(tiny_store: Path, run_dir: Path) -> None:
    """With room for everything, two nodes together read each expert once."""
    with stack(tiny_store, run_dir, (256, 256), 2 * 256 + 4) as (store, nodes, _):
        answers: dict[int, list[int]] = {}

        def run(number: int) -> None:
            answers[number] = generate(nodes[number].address, PROMPTS[0])

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers[0] == answers[1]
        stats = store_stats(store.address)
        num_resident = len(_resident(nodes[0]))
        assert num_resident == len(_resident(nodes[1]))
        assert stats.demand_reads + stats.prefetches_used == num_resident
        assert stats.shared_hits == num_resident + stats.prefetches_used
        with NodeClient(nodes[0].address) as a, NodeClient(nodes[1].address) as b:
            first, second = a.stats(), b.stats()
        assert first.misses == second.misses
        expert_bytes = stats.bytes_read // (stats.demand_reads + stats.prefetch_reads)
        assert first.bytes_read + second.bytes_read == stats.demand_reads * expert_bytes


def _resident(node: DaemonProcess) -> range:
    with NodeClient(node.address) as client:
        return range(client.stats().resident)


def test_stopped_node_with_a_cut_stream_keeps_its_slots(tiny_store: Path, run_dir: Path) -> None:
    """SIGSTOP mid-generation, stream cut: while its lock is held, none of its slots is refilled."""
    with stack(tiny_store, run_dir, (64, 64), 64 + 64 + 4, proxied=True) as (store, nodes, proxy):
        assert proxy is not None
        undisturbed = generate(nodes[1].address, PROMPTS[1], 200)
        with NodeClient(nodes[0].address) as client:
            generation = client.generate(PROMPTS[1], max_tokens=200, ignore_eos=True)
            pieces = iter(generation)
            for _ in range(5):
                next(pieces)
            held = client.stats().resident
            os.kill(nodes[0].process.pid, signal.SIGSTOP)
            proxy.cut()
            wait_for(lambda: store_stats(store.address).orphaned_sessions == 1, 20, "an orphan")
            before = _generations(tiny_store, run_dir)
            # The other node turns its own slots over many times.
            for prompt in (PROMPTS[0], "man: NAME", "import os", "Der Befehl"):
                generate(nodes[1].address, prompt, 64)
            after = _generations(tiny_store, run_dir)
            assert store_stats(store.address).slots_leased >= held > 0
            changed = sum(a != b for a, b in zip(before, after, strict=True))
            assert changed <= len(before) - held, "a slot of the stopped node was refilled"
            assert changed > len(before) // 4, "too little was refilled to prove anything"
            os.kill(nodes[0].process.pid, signal.SIGCONT)
            for _ in pieces:
                pass
            assert generation.result is not None
            assert generation.result.token_ids == undisturbed


def _generations(store_dir: Path, run_dir: Path) -> list[int]:
    path = store_table(store_dir, run_dir, 1)["segment_path"]
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping,
        memoryview(mapping) as view,
    ):
        layout, _ = shm.read_header(view, len(mapping))
        return [shm.read_generation(view, layout, slot, 0) for slot in range(layout.num_slots)]


def test_killed_node_gives_back_while_the_other_generates(tiny_store: Path, run_dir: Path) -> None:
    with stack(tiny_store, run_dir, (64, 64), 64 + 64 + 4) as (store, nodes, _):
        undisturbed = generate(nodes[1].address, PROMPTS[0], 200)
        with NodeClient(nodes[0].address) as dying, NodeClient(nodes[1].address) as living:
            generation = living.generate(PROMPTS[0], max_tokens=200, ignore_eos=True)
            pieces = iter(generation)
            doomed = iter(dying.generate(PROMPTS[1], max_tokens=1500, ignore_eos=True))
            for _ in range(5):
                next(pieces)
                next(doomed)
            nodes[0].stop(signal.SIGKILL)
            with pytest.raises(errors.Unavailable):
                for _ in doomed:
                    pass
            for _ in pieces:
                pass
            assert generation.result is not None
            assert generation.result.token_ids == undisturbed
            wait_for(lambda: store_stats(store.address).sessions == 1, 10, "its session to end")
            stats = store_stats(store.address)
            assert stats.slots_leased <= 64 and stats.slots_filling == 0


def test_remote_node_over_chunks_gives_the_same_tokens(tiny_store: Path, run_dir: Path) -> None:
    """A node without the shared segment gets checksummed chunks."""
    table = store_table(tiny_store, run_dir, 100)
    with daemon("expert_store", run_dir, table) as store:
        shared = node_table(run_dir, "a", 48)
        remote = node_table(run_dir, "b", 48, transport="chunks")
        with (
            daemon("compute_node", run_dir, shared, "a") as a,
            daemon("compute_node", run_dir, remote, "b") as b,
        ):
            assert generate(a.address, PROMPTS[0], 64) == generate(b.address, PROMPTS[0], 64)
            with NodeClient(b.address) as client:
                assert client.stats().misses > 100
        wait_for(lambda: is_store_idle(store.address), 20, "every lease to come back")


def test_restarted_node_starts_warm(tiny_store: Path, run_dir: Path) -> None:
    with daemon("expert_store", run_dir, store_table(tiny_store, run_dir, 260)) as store:
        with daemon("compute_node", run_dir, node_table(run_dir, "a", 256), "a") as first:
            tokens = generate(first.address, PROMPTS[0])
        reads = store_stats(store.address).demand_reads
        with daemon("compute_node", run_dir, node_table(run_dir, "a", 256), "a") as second:
            assert generate(second.address, PROMPTS[0]) == tokens
            with NodeClient(second.address) as client:
                assert client.stats().misses == 0
        assert store_stats(store.address).demand_reads == reads
        assert reads <= Manifest.load(tiny_store).spec.num_experts_total
