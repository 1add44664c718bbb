"""All certificates of a main node and its worker are replaced while it generates, authority and
all: nothing is restarted for it, and the next connection is made with the new ones.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from compute_node.client.node_client import NodeClient
from expert_store.manifest.manifest import Manifest
from tests.certificates import certificate, files, issued, serial_shown
from tests.daemons import daemon, node_table, store_table
from tests.ports import free_port
from tests.stack import wait_for

pytestmark = pytest.mark.system
PROMPT, TOKENS = "In the beginning God created", 64


def test_renewed_while_a_generation_runs(tiny_store: Path, run_dir: Path) -> None:
    slots = Manifest.load(tiny_store).spec.num_experts_total // 4
    issued(run_dir / "certs", "main", "w1")
    main, lent = (files(run_dir / "certs", box) for box in ("main", "w1"))
    address = f"127.0.0.2:{free_port('127.0.0.2')}"
    (run_dir / "w1").mkdir()
    worker_table = {
        "address": f"unix:{run_dir}/w1/worker.sock",
        "listen": address,
        "store_address": f"unix:{run_dir}/w1/store.sock",
        "session_dir": str(run_dir / "w1/sessions"),
        "slots": slots,
        "tls": lent.model_dump(mode="json"),
    }
    segment = f"/dev/shm/flashmoe-test-{run_dir.name}"
    table = node_table(
        run_dir, "main", slots, workers=[address], worker_tls=main.model_dump(mode="json")
    )
    with (
        daemon(
            "expert_store",
            run_dir / "w1",
            store_table(tiny_store, run_dir / "w1", slots + 4, segment_path=f"{segment}-w1"),
        ),
        daemon("expert_store", run_dir, store_table(tiny_store, run_dir, slots + 4)),
        daemon("worker", run_dir / "w1", worker_table, module="compute_node.worker") as worker,
        daemon("compute_node", run_dir, table) as node,
        NodeClient(node.address) as client,
    ):

        def is_up() -> bool:
            return bool(client.stats().of(box=address).up)

        def tokens() -> list[int]:
            answer = client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True, timeout_s=120)
            found = []
            for piece in answer:
                found.append(piece.token_id)
                if len(found) == 8 and former == serial_shown(address, main):
                    renew(run_dir)
            return found

        wait_for(is_up, 60, "the worker to join")
        former = serial_shown(address, main)
        assert former == certificate(lent.cert).serial_number
        first = tokens()
        assert certificate(lent.cert).serial_number != former
        assert serial_shown(address, main) == certificate(lent.cert).serial_number
        assert is_up() and client.stats().of(box=address).failed == 0, "the stream lived on"
        worker.stop(signal.SIGKILL)
        wait_for(lambda: not is_up(), 60, "the node to notice")
        with daemon("worker", run_dir / "w1", worker_table, module="compute_node.worker"):
            wait_for(is_up, 60, "the node to connect with what was renewed")
            assert tokens() == first


def renew(run_dir: Path) -> None:
    """By another authority, over what is there."""
    issued(run_dir / "new", "main", "w1")
    for path in (run_dir / "new").iterdir():
        path.replace(run_dir / "certs" / path.name)
