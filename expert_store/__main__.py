"""The expert_store daemon: `python -m expert_store --config flashmoe.toml`."""

from __future__ import annotations

import argparse
import asyncio
import logging.config
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from prometheus_client import REGISTRY, start_http_server

from expert_store import segment
from expert_store.config import ExpertStoreConfig
from expert_store.manifest import Manifest, check_sources
from expert_store.metrics import StoreCollector
from expert_store.reader import ReadQueue, open_files
from expert_store.service import SERVICE_NAME, ExpertStoreService
from expert_store.sessions import SessionTable, await_free_locks
from expert_store.slots import SlotPool
from expert_store.store import ExpertStore
from proto import errors, rpc
from proto.expert_store_pb2_grpc import add_ExpertStoreServicer_to_server

logger = logging.getLogger("expert_store")


async def run(
    config: ExpertStoreConfig, until_stopped: Callable[[], Awaitable[None]] = rpc.until_signalled
) -> None:
    """Serve until told to stop. The order of lines is the order of start, reversed for stop."""
    manifest = Manifest.load(config.store_dir)
    root = manifest.root(config.store_dir, config.source_root)
    check_sources(manifest, root)
    rpc.check_socket_free(config.address)
    await await_free_locks(config.session_dir, config.lock_poll_s, config.restart_wait_s)
    with (
        segment.create(config.segment_path, config.num_slots, manifest.slot_bytes) as shared,
        open_files(manifest, root, config.direct_io) as files,
    ):
        slots = SlotPool(shared)
        max_leased = config.num_slots - config.read_depth
        sessions = SessionTable(slots, max_leased, config.session_dir, config.lock_poll_s)
        queue = ReadQueue(config.read_depth, config.max_queued_reads)
        store = ExpertStore(manifest, shared, slots, sessions, queue, files)
        service = ExpertStoreService(store, str(root), config.read_depth)
        _start_metrics(config, store)
        async with rpc.serving(
            config.listen,
            lambda server: add_ExpertStoreServicer_to_server(service, server),
            [SERVICE_NAME],
            config.stop_grace_s,
            service.drain,
        ):
            logger.info(
                "ready",
                extra={
                    "address": config.address,
                    "experts": len(manifest.records),
                    "slots": config.num_slots,
                    "segment_bytes": shared.layout.segment_bytes,
                },
            )
            await until_stopped()
        await store.drain()
        sessions.stop()
        queue.close()


def _start_metrics(config: ExpertStoreConfig, store: ExpertStore) -> None:
    if config.metrics_port is None:
        return
    REGISTRY.register(StoreCollector(store))
    server, _ = start_http_server(config.metrics_port, addr="127.0.0.1")
    if config.metrics_port_file:
        config.metrics_port_file.write_text(f"{server.server_port}\n")


def configure_logging(level: str) -> None:
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "json": {
                    "()": "pythonjsonlogger.json.JsonFormatter",
                    "format": "%(asctime)s %(levelname)s %(name)s %(message)s",
                }
            },
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
            "root": {"level": level, "handlers": ["stderr"]},
        }
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Owns the SSD: lends experts by shared memory.")
    parser.add_argument("--config", type=Path, required=True, help="flashmoe.toml")
    arguments = parser.parse_args()
    try:
        config = ExpertStoreConfig.load(arguments.config)
        configure_logging(config.log_level)
        asyncio.run(run(config))
    except errors.FlashMoEError as error:
        sys.stderr.write(f"expert_store: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
