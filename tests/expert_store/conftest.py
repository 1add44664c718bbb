"""Short run folders, a small store, and a tiny checkpoint with its two kinds of store."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from expert_store.offline.index import index
from expert_store.offline.pack import pack
from tests.checkpoints import make
from tests.expert_store.raw_session import Wire, exchange, receive
from tests.expert_store.stores import (
    FILE_NAME,
    KEYS,
    expert_bytes,
    expert_range,
    flip,
    write_store,
)
from tests.local_store import local_store

NUM_SLOTS, READ_DEPTH = 8, 2
_numbers = itertools.count()


def short_folder() -> Iterator[Path]:
    """A folder whose path is short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="fm-"))
    yield path
    shutil.rmtree(path)


run_dir = pytest.fixture(short_folder, name="run_dir")
module_run_dir = pytest.fixture(short_folder, name="module_run_dir", scope="module")


@dataclass(frozen=True)
class SmallDisk:
    """A file system of its own, that a test may fill and enlarge."""

    path: Path

    def resize(self, size_bytes: int) -> None:
        options = f"remount,size={size_bytes}"
        subprocess.run(["mount", "-o", options, str(self.path)], check=True)

    @property
    def free_bytes(self) -> int:
        return shutil.disk_usage(self.path).free


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """64 KiB, until it is resized."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=65536", "tmpfs", str(path)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True)
    if not mounted or mounted.returncode:
        pytest.skip("a small file system to fill cannot be mounted here: that takes root")
    yield SmallDisk(path)
    subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    """A folder there, as the segment's is."""
    with tempfile.TemporaryDirectory(prefix="flashmoe-test-", dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def store_dir(tmp_path: Path) -> Path:
    write_store(tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One expert is two tensors of gate and up, and one of down. Read it only."""
    return make("qwen3_moe", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def indexed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("indexed")
    index(checkpoint, folder)
    return folder


@pytest.fixture(scope="session")
def packed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "store"
    pack(checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def folder(module_run_dir: Path) -> Path:
    """The last expert is damaged."""
    write_store(module_run_dir / "store")
    flip(module_run_dir / "store" / FILE_NAME, expert_range(KEYS[-1])[77])
    return module_run_dir / "store"


@pytest.fixture(scope="module")
def wire(folder: Path, module_run_dir: Path) -> Iterator[Wire]:
    settings: dict[str, Any] = {"read_depth": READ_DEPTH, "lock_poll_s": 0.01}
    with (
        local_store(folder, module_run_dir, NUM_SLOTS, **settings) as address,
        Wire(address, module_run_dir) as wire,
    ):
        yield wire


def check_healthy(wire: Wire, folder: Path) -> None:
    """Idle, all slots accounted for, and a fresh session for all of the quota gets its bytes."""
    stats = wire.until_idle()
    assert stats.slots_free + stats.slots_reclaimable == NUM_SLOTS
    with wire.open_chunks(quota_slots=NUM_SLOTS - READ_DEPTH) as session:
        key = KEYS[next(_numbers) % (len(KEYS) - 1)]
        session.send(exchange([key], exchange_id=9))
        assert receive(session)[key][0] == expert_bytes(folder, key)
    wire.until_idle()
