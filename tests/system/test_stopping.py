"""SIGTERM during an answer that outlasts the grace: the client learns that the node is stopping.

Fault seen red: gRPC cancels the call, and the client reads "Cancelling all calls".
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from compute_node.client.node_client import NodeClient
from proto import errors
from tests.daemons import daemon, node_table, store_table

pytestmark = pytest.mark.system


def test_a_client_learns_that_the_node_is_stopping(tiny_store: Path, run_dir: Path) -> None:
    table = node_table(run_dir, "n", 96, stop_grace_s=0.2)
    with (
        daemon("expert_store", run_dir, store_table(tiny_store, run_dir, 100)),
        daemon("compute_node", run_dir, table, "n") as node,
        NodeClient(node.address) as client,
    ):
        pieces = iter(client.generate("In", max_tokens=2000, ignore_eos=True, timeout_s=60))
        next(pieces)
        node.process.send_signal(signal.SIGTERM)
        with pytest.raises(errors.Unavailable, match="the node is stopping"):
            list(pieces)
        assert node.process.wait(30) == 0
