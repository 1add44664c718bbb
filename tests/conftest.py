"""What every test shares: the shipped model's store, short run directories, one compute thread, the
same random numbers for a test each time.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import psutil
import pytest
import torch

from compute_node.native import binding
from expert_store.offline.index import index
from tests.chat_model import make_chat_model
from tests.stack import MODEL

# Tiny matrices gain nothing from a second thread, and lose a lot when the machine is busy.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--native",
        choices=get_args(binding.Setting),
        default="auto",
        help="what compute_node's `native` is where a test computes by itself",
    )


def pytest_configure(config: pytest.Config) -> None:
    binding.use(config.getoption("--native"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """A test that fails, a time limit included, leaves no process that slows the others."""
    own = psutil.Process()
    before = own.children()
    try:
        yield
    except BaseException:
        left = [process for process in own.children() if process not in before]
        for process in left:
            process.terminate()
        for process in psutil.wait_procs(left, timeout=20)[1]:
            process.kill()
        raise


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> None:
    """What a test draws from torch depends neither on the order of tests nor on their number, so
    that a comparison within a tolerance holds every time or never.
    """
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, indexed in place."""
    store_dir = tmp_path_factory.mktemp("store") / "tiny-moe"
    index(MODEL, store_dir)
    return store_dir


@pytest.fixture(scope="session")
def chat_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with a chat template, indexed in place."""
    folder = tmp_path_factory.mktemp("chat")
    index(make_chat_model(folder / "checkpoints" / "tiny-chat"), folder / "tiny-chat")
    return folder / "tiny-chat"


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """Short enough for Unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="fm-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)
