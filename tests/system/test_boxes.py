"""A main node and workers on other boxes, each a store and a process: the tokens of one box,
whatever becomes of the workers.

Planted fault seen red: a late answer awaited for ever.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from compute_node.client.node_client import NodeClient
from expert_store.manifest.manifest import Manifest
from expert_store.offline.index import index
from tests.checkpoints import make
from tests.daemons import DaemonProcess, daemon, is_store_idle, node_table, store_table
from tests.ports import free_port
from tests.stack import FLASHMOE, ROOT, flashmoe, served, wait_for

pytestmark = pytest.mark.system
PROMPT, TOKENS = "In the beginning God created", 48
LONG_PROMPT = "The use of the file is to be " * 20


@dataclass
class Cluster:
    """workers: their daemons; folders: where each lies"""

    node: NodeClient
    workers: list[DaemonProcess]
    folders: list[Path]

    def tokens(self, prompt: str = PROMPT, max_tokens: int = TOKENS) -> list[int]:
        answer = self.node.generate(prompt, max_tokens=max_tokens, ignore_eos=True, timeout_s=120)
        return answer.run().token_ids

    def tokens_killing(self, number: int) -> list[int]:
        """A worker is killed amid them; the node has noticed."""
        answer = self.node.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True, timeout_s=120)
        tokens = []
        for piece in answer:
            tokens.append(piece.token_id)
            if len(tokens) == 8:
                self.workers[number].stop(signal.SIGKILL)
        wait_for(lambda: self.figure("up")[number] == 0, 20, "the node to notice")
        return tokens

    def check_all_compute(self, expected: dict[str, list[int]]) -> None:
        """The tokens of one box, by prompt, in which every worker had a part."""
        for prompt, tokens in expected.items():
            assert self.tokens(prompt) == tokens
        assert min(self.figure("answered")) > TOKENS
        assert self.figure("failed") == [0] * len(self.workers)

    def figure(self, name: str) -> list[float]:
        """Of each worker, as the node counts it."""
        stats = self.node.stats()
        return [getattr(stats.of(box=one.address), name) for one in self.workers]


def worker_table(folder: Path, slots: int) -> dict[str, object]:
    return {
        "address": f"unix:{folder}/worker.sock",
        "store_address": f"unix:{folder}/store.sock",
        "session_dir": str(folder / "sessions"),
        "slots": slots,
    }


@contextmanager
def worker(folder: Path, slots: int) -> Iterator[DaemonProcess]:
    table = worker_table(folder, slots)
    with daemon("worker", folder, table, module="compute_node.worker") as started:
        yield started


@contextmanager
def cluster(
    store_dir: Path, run_dir: Path, num_workers: int, stores: Sequence[Path] = (), **node: object
) -> Iterator[Cluster]:
    """stores: of the workers; empty: all have that of the main node; node: settings of the main
    node
    """
    total = Manifest.load(store_dir).spec.num_experts_total
    slots = total // 4
    with ExitStack() as stack:
        folders = [run_dir / f"box{number}" for number in range(num_workers)]
        workers = []
        for folder, store in zip(folders, stores or [store_dir] * num_workers, strict=True):
            folder.mkdir()
            stack.enter_context(daemon("expert_store", folder, segment(store, folder, slots + 4)))
            workers.append(stack.enter_context(worker(folder, slots)))
        main = run_dir / "main"
        main.mkdir()
        own_store = stack.enter_context(
            daemon("expert_store", main, segment(store_dir, main, slots + 4))
        )
        addresses = [one.address for one in workers]
        table = node_table(main, "main", slots, workers=addresses, **node)
        main_node = stack.enter_context(daemon("compute_node", main, table))
        client = stack.enter_context(NodeClient(main_node.address))
        yield Cluster(client, workers, folders)
        client.close()
        assert main_node.stop() == 0, main_node.log.read_text()[-2000:]
        wait_for(lambda: is_store_idle(own_store.address), 20, "every lease to come back")


def segment(store_dir: Path, folder: Path, num_slots: int) -> dict[str, object]:
    name = f"/dev/shm/flashmoe-test-{folder.parent.name}-{folder.name}"
    return store_table(store_dir, folder, num_slots, segment_path=name)


@pytest.fixture(scope="module")
def alone(tiny_store: Path) -> Iterator[dict[str, list[int]]]:
    """What one box gives."""
    folder = Path(tempfile.mkdtemp(prefix="fm-"))
    slots = Manifest.load(tiny_store).spec.num_experts_total // 4
    with (
        daemon("expert_store", folder, segment(tiny_store, folder, slots + 4)),
        daemon("compute_node", folder, node_table(folder, "alone", slots)) as node,
        NodeClient(node.address) as client,
    ):
        found = {}
        for prompt in (PROMPT, LONG_PROMPT):
            answer = client.generate(prompt, max_tokens=TOKENS, ignore_eos=True)
            found[prompt] = answer.run().token_ids
    yield found
    shutil.rmtree(folder, ignore_errors=True)


def test_tokens_are_those_of_one_box(
    alone: dict[str, list[int]], tiny_store: Path, run_dir: Path
) -> None:
    with cluster(tiny_store, run_dir, 2) as boxes:
        boxes.check_all_compute(alone)


def test_a_worker_that_is_killed_is_done_without_and_joins_again(
    alone: dict[str, list[int]], tiny_store: Path, run_dir: Path
) -> None:
    with cluster(tiny_store, run_dir, 2) as boxes:
        assert boxes.tokens_killing(0) == alone[PROMPT]
        assert boxes.tokens() == alone[PROMPT]
        with worker(boxes.folders[0], 64):
            wait_for(lambda: boxes.figure("up")[0] == 1, 30, "the worker to join again")
            before = boxes.figure("answered")[0]
            assert boxes.tokens() == alone[PROMPT]
            assert boxes.figure("answered")[0] > before


def test_a_worker_that_stands_still_is_not_waited_for(
    alone: dict[str, list[int]], tiny_store: Path, run_dir: Path
) -> None:
    with cluster(tiny_store, run_dir, 1) as boxes:
        assert boxes.tokens() == alone[PROMPT]
        os.kill(boxes.workers[0].process.pid, signal.SIGSTOP)
        assert boxes.tokens() == alone[PROMPT]
        assert boxes.figure("late")[0] >= 1
        os.kill(boxes.workers[0].process.pid, signal.SIGCONT)
        assert boxes.tokens() == alone[PROMPT]


def test_a_worker_and_a_main_node_by_their_commands(
    alone: dict[str, list[int]], tiny_store: Path, run_dir: Path
) -> None:
    """Planted fault seen red: the worker's face not found by `status`."""
    port = free_port()
    flags = ["--listen", f"127.0.0.1:{port}", "--experts-memory", "25%"]
    with (
        running("worker", "--model", str(tiny_store), "--run-dir", str(run_dir / "w"), *flags),
        served(tiny_store, run_dir / "m", "--worker", f"127.0.0.1:{port}") as main,
    ):
        assert main.generate(PROMPT, max_tokens=TOKENS) == alone[PROMPT]
        [box] = main.status()["compute_node"]["boxes"].values()
        assert box["up"] and box["answered"] > TOKENS
        status = flashmoe("status", "--run-dir", str(run_dir / "w"), "--json")
        there = json.loads(status.stdout)
        assert there["worker"]["health"] == there["expert_store"]["health"] == "SERVING"
        assert there["worker"]["answered"] >= box["answered"]
        page = flashmoe("status", "--run-dir", str(run_dir / "m")).stdout
        assert f"box 127.0.0.1:{port}" in page.replace("  ", " "), page


def test_a_worker_of_another_model_is_refused_by_name(
    tiny_store: Path, run_dir: Path, tmp_path: Path
) -> None:
    other = make("qwen3_moe", tmp_path / "checkpoint", torch.bfloat16)
    index(other, tmp_path / "other")
    port = free_port()
    flags = ["--listen", f"127.0.0.1:{port}", "--experts-memory", "100%"]
    store, run = str(tmp_path / "other"), str(run_dir / "w")
    with running("worker", "--model", store, "--run-dir", run, *flags):
        main = ["--run-dir", str(run_dir / "m"), "--worker", f"127.0.0.1:{port}"]
        found = flashmoe("serve", "--model", str(tiny_store), "--experts-memory=25%", *main)
    assert found.returncode == 2
    assert f"127.0.0.1:{port} has another model" in found.stderr


@contextmanager
def running(*arguments: str) -> Iterator[None]:
    """A verb that says when it is ready, for the block."""
    process = subprocess.Popen([*FLASHMOE, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline().startswith("ready: ")
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        process.stdout.close()
