"""A real expert store, served on a Unix socket from a thread of the test process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from expert_store.__main__ import run
from expert_store.config import ExpertStoreConfig


@contextmanager
def local_store(
    store_dir: Path, run_dir: Path, num_slots: int, **settings: object
) -> Iterator[str]:
    """Its address, for the block. The segment lies in run_dir."""
    config = ExpertStoreConfig(
        **{
            "address": f"unix:{run_dir}/store.sock",
            "store_dir": store_dir,
            "segment_path": run_dir / "segment",
            "session_dir": run_dir / "sessions",
            "num_slots": num_slots,
            "stop_grace_s": 1.0,
            **settings,
        }
    )
    ready, failure = threading.Event(), []
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        stop = asyncio.Event()
        loops.append((asyncio.get_running_loop(), stop))

        async def until_stopped() -> None:
            ready.set()
            await stop.wait()

        await run(config, until_stopped)

    def main() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            failure.append(error)
            raise
        finally:
            ready.set()

    thread = threading.Thread(target=main, name="local-store")
    thread.start()
    ready.wait(30)
    if failure:
        thread.join()
        raise failure[0]
    try:
        yield config.address
    finally:
        loop, stop = loops[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join()
