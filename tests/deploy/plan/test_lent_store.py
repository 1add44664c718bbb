"""What a box without a store plans by: what the store of another says.

Planted faults seen red: a store that is away waited for without an end, or not at all, an answer of
something else taken for a store that is away, a share taken for the whole model.
"""

from __future__ import annotations

import threading
import time
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from deploy.plan.lent_store import LentStore
from expert_store.manifest.manifest import Manifest
from expert_store.manifest.share import Share
from expert_store.offline.shard import shard
from proto import errors
from tests.local_store import local_store
from tests.ports import free_port


def test_a_store_is_known_by_what_it_says(tiny_store: Path, run_dir: Path) -> None:
    manifest, address = Manifest.load(tiny_store), f"127.0.0.1:{free_port()}"
    with local_store(tiny_store, run_dir, 16, listen=address):
        found = LentStore.at(address, None, 20.0)
    assert found.spec == manifest.spec
    assert (found.slot_bytes, found.num_experts) == (manifest.slot_bytes, manifest.num_experts)
    assert found.sizing.hidden_size == manifest.sizing.hidden_size


def test_a_store_that_is_away_is_waited_for(tiny_store: Path, run_dir: Path) -> None:
    address, found = f"127.0.0.1:{free_port()}", []

    def ask() -> None:
        found.append(LentStore.at(address, None, 60.0))

    thread = threading.Thread(target=ask)
    thread.start()
    with local_store(tiny_store, run_dir, 16, listen=address):
        thread.join(60)
    assert found
    began_s = time.monotonic()
    with pytest.raises(errors.Unavailable, match=rf"start `flashmoe serve --lend {address}` on"):
        LentStore.at(address, None, 0.3)
    assert time.monotonic() - began_s < 30


def test_what_is_no_store_is_said_to_be_none() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(1))  # without the store's service
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        with pytest.raises(errors.ConfigInvalid, match=f"answers at {address} is no expert_store"):
            LentStore.at(address, None, 30.0)
    finally:
        server.stop(None).wait()


def test_a_share_is_lent_as_far_as_it_goes(tiny_store: Path, run_dir: Path, tmp_path: Path) -> None:
    shard(tiny_store, Share(1, 3), tmp_path / "share")
    address = f"127.0.0.1:{free_port()}"
    with local_store(tmp_path / "share", run_dir, 16, listen=address):
        found = LentStore.at(address, None, 20.0)
    assert found.num_experts == Manifest.load(tmp_path / "share").num_experts < 100
