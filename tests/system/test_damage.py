"""Damaged, missing and changed sources: a typed error that names them, and everything else goes on.

Planted faults seen red: a reader that skips its checksum, a node that skips those of dense weights.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from compute_node.client.node_client import NodeClient
from expert_store.manifest.manifest import Manifest
from expert_store.offline.index import index
from proto import errors, rpc
from proto.expert import ExpertKey, RecordKey
from proto.expert_store_pb2 import ResidentRequest
from proto.expert_store_pb2_grpc import ExpertStoreStub
from tests.checkpoints import make
from tests.daemons import DaemonProcess, daemon, node_table, store_stats, store_table
from tests.expert_store.stores import flip
from tests.stack import MODEL, ROOT, flashmoe

pytestmark = pytest.mark.system
PROMPT = "In the beginning God created"


@pytest.fixture
def copied(tmp_path: Path) -> tuple[Path, Path]:
    return copy_of_shipped_model(tmp_path)


def copy_of_shipped_model(tmp_path: Path) -> tuple[Path, Path]:
    """A private copy of the shipped model, and a store over it."""
    root, store_dir = tmp_path / "model", tmp_path / "store"
    shutil.copytree(MODEL, root)
    index(root, store_dir)
    return root, store_dir


def flip_expert(root: Path, store_dir: Path, key: ExpertKey) -> None:
    """Change one byte of an expert, and leave the file's size and time as they were."""
    manifest = Manifest.load(store_dir)
    extent = manifest.records[RecordKey(key)].extents[0]
    path = root / manifest.files[extent.file].path
    flip(path, extent.offset_bytes + extent.length_bytes // 2)


def first_used_expert(store_dir: Path, run_dir: Path) -> ExpertKey:
    """Some expert that the prompt needs, by running it once."""
    with (
        daemon("expert_store", run_dir, store_table(store_dir, run_dir, 260)) as store,
        daemon("compute_node", run_dir, node_table(run_dir, "a", 256), "a") as node,
    ):
        with NodeClient(node.address) as client:
            client.generate(PROMPT, max_tokens=1).run()
        with rpc.connect(store.address) as channel:
            keys = ExpertStoreStub(channel).Resident(ResidentRequest()).keys
        return min(RecordKey.from_pb(key).expert for key in keys)


def test_flipped_byte_is_data_loss_and_the_rest_goes_on(
    copied: tuple[Path, Path], run_dir: Path
) -> None:
    root, store_dir = copied
    key = first_used_expert(store_dir, run_dir)
    flip_expert(root, store_dir, key)
    with (
        daemon("expert_store", run_dir, store_table(store_dir, run_dir, 100)) as store,
        daemon("compute_node", run_dir, node_table(run_dir, "a", 96), "a") as node,
        NodeClient(node.address) as client,
    ):
        for _ in range(2):  # the second time it is in quarantine already
            with pytest.raises(errors.ExpertDamaged) as raised:
                client.generate(PROMPT, max_tokens=4).run()
            assert str(key) in str(raised.value)
            assert "model.safetensors" in str(raised.value)
            assert "flashmoe verify" in str(raised.value)
        assert list(store_stats(store.address).quarantined) == [str(key)]
        answered = 0
        for token in range(300, 340):  # single tokens route to few experts
            try:
                answered += len(client.generate([token], max_tokens=1).run().token_ids)
            except errors.ExpertDamaged:
                continue
        assert answered > 0
    found = flashmoe("verify", str(store_dir))
    assert found.returncode == 1
    assert found.stdout.startswith(f"{key} in ") and found.stdout.count("\n") == 1


def start_store(store_dir: Path, run_dir: Path) -> subprocess.CompletedProcess[str]:
    """What a store says that must not come up."""
    config = run_dir / "refused.toml"
    config.write_text(tomli_w.dumps({"expert_store": store_table(store_dir, run_dir, 100)}))
    command = [sys.executable, "-m", "expert_store", "--config", str(config)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)


def test_damaged_dense_weight_stops_the_node(copied: tuple[Path, Path], run_dir: Path) -> None:
    root, store_dir = copied
    damaged = Manifest.load(store_dir).spec.dense[-1]
    flip(root / damaged.file, damaged.offset_bytes)
    with daemon("expert_store", run_dir, store_table(store_dir, run_dir, 40)):
        node = DaemonProcess("compute_node", run_dir, node_table(run_dir, "n", 32))
        try:
            assert node.process.wait(60) == 2
        finally:
            node.stop()
    assert (
        f"compute_node: {damaged.name} in {root / damaged.file} is damaged" in node.log.read_text()
    )


def test_truncated_file_is_refused_by_name(copied: tuple[Path, Path], run_dir: Path) -> None:
    root, store_dir = copied
    path = root / "model.safetensors"
    os.truncate(path, path.stat().st_size - 4096)
    refused = start_store(store_dir, run_dir)
    assert refused.returncode == 2
    assert str(path) in refused.stderr and "index again" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_file_cut_off_while_serving_is_data_loss(copied: tuple[Path, Path], run_dir: Path) -> None:
    root, store_dir = copied
    with (
        daemon("expert_store", run_dir, store_table(store_dir, run_dir, 100)),
        daemon("compute_node", run_dir, node_table(run_dir, "a", 96), "a") as node,
        NodeClient(node.address) as client,
    ):
        os.truncate(root / "model.safetensors", 1 << 20)
        with pytest.raises(errors.ExpertDamaged, match="ends"):
            client.generate(PROMPT, max_tokens=4).run()


def test_missing_shard_is_refused_by_name(tmp_path: Path, run_dir: Path) -> None:
    root = make("qwen3_moe", tmp_path / "model", max_shard_size="60KB")
    index(root, tmp_path / "store")
    shard = sorted(root.glob("model-*.safetensors"))[2]
    shard.unlink()
    refused = start_store(tmp_path / "store", run_dir)
    assert refused.returncode == 2
    assert str(shard) in refused.stderr and "missing" in refused.stderr


def test_touched_source_asks_for_verify_which_heals_it(
    copied: tuple[Path, Path], run_dir: Path
) -> None:
    root, store_dir = copied
    os.utime(root / "model.safetensors")
    refused = start_store(store_dir, run_dir)
    assert refused.returncode == 2 and "flashmoe verify" in refused.stderr
    healed = flashmoe("verify", str(store_dir))
    assert healed.returncode == 0, healed.stderr
    with daemon("expert_store", run_dir, store_table(store_dir, run_dir, 100)):
        pass


def test_second_store_on_the_same_socket_is_refused(tiny_store: Path, run_dir: Path) -> None:
    with daemon("expert_store", run_dir, store_table(tiny_store, run_dir, 100)) as first:
        refused = start_store(tiny_store, run_dir)
        assert refused.returncode == 2
        assert "another daemon answers" in refused.stderr
        assert store_stats(first.address).sessions == 0


def test_leftover_of_a_crashed_store_is_taken_over(tiny_store: Path, run_dir: Path) -> None:
    """Killed: socket and segment stay. The next one formats the same segment."""
    table = store_table(tiny_store, run_dir, 100)
    with daemon("expert_store", run_dir, table) as crashed:
        crashed.stop(9)
    segment = Path(table["segment_path"])
    inode = segment.stat().st_ino
    with (
        daemon("expert_store", run_dir, table),
        daemon("compute_node", run_dir, node_table(run_dir, "a", 96), "a") as node,
        NodeClient(node.address) as client,
    ):
        assert segment.stat().st_ino == inode
        assert len(client.generate(PROMPT, max_tokens=4).run().token_ids) == 4
    assert not segment.exists()
