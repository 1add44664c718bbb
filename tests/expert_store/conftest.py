"""Short run folders, a small store, and a tiny checkpoint with its two kinds of store."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from expert_store.index import index
from expert_store.pack import pack
from tests.checkpoints import make
from tests.expert_store.stores import write_store


def short_folder() -> Iterator[Path]:
    """A folder whose path is short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="fm-"))
    yield path
    shutil.rmtree(path)


run_dir = pytest.fixture(short_folder, name="run_dir")
module_run_dir = pytest.fixture(short_folder, name="module_run_dir", scope="module")


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
