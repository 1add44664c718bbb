"""The expert_store daemon: `python -m expert_store --config flashmoe.toml`."""

from __future__ import annotations

from proto.process import last_words

if __name__ == "__main__":
    last_words.report_failed_imports("expert_store")

import proto.process.quiet_grpc  # noqa: F401  isort: skip  before grpc

import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from expert_store.config import ExpertStoreConfig
from expert_store.face.checkpoint import Checkpoint
from expert_store.face.local_socket import LocalSocket
from expert_store.face.service import SERVICE_NAME, ExpertStoreService
from expert_store.io import kernel_queue
from expert_store.io.device import Device
from expert_store.manifest.manifest import Manifest, check_sources
from expert_store.store import resident_list, segment
from expert_store.store.fill import PieceRead
from expert_store.store.readers import Readers
from expert_store.store.sessions import SessionTable, await_free_locks
from expert_store.store.slots import SlotPool
from expert_store.store.store import ExpertStore
from expert_store.store.verified_read import open_files
from proto import rpc
from proto.expert_store_pb2_grpc import add_ExpertStoreServicer_to_server
from proto.process import daemon

logger = logging.getLogger("expert_store")


async def run(
    config: ExpertStoreConfig, until_stopped: Callable[[], Awaitable[None]] = rpc.until_signalled
) -> None:
    """Serve until a signal comes. The order of lines is the order of start, reversed for stop."""
    manifest = Manifest.load(config.store_dir)
    root = manifest.root(config.store_dir, config.source_root)
    check_sources(manifest, root)
    rpc.check_socket_free(config.address)
    size_classes = manifest.size_classes
    device: Device[PieceRead]
    await await_free_locks(config.session_dir, config.lock_poll_s, config.restart_wait_s)
    with (
        segment.create(
            config.segment_path, size_classes.segment_layout(config.num_slots)
        ) as shared,
        open_files(manifest, root, config.direct_io) as files,
        kernel_queue.opened(files, config.read_depth) as device,
    ):
        lock = threading.RLock()
        slots = SlotPool(shared)
        sessions = SessionTable(
            slots,
            lock,
            config.max_leased * size_classes.slot_bytes,
            size_classes.lease_bytes,
            config.session_dir,
            config.lock_poll_s,
            config.lent_slots * size_classes.slot_bytes,
        )
        store = ExpertStore(
            manifest,
            shared,
            slots,
            sessions,
            lock,
            config.read_depth,
            config.max_queued_reads,
            config.piece_bytes,
            files.direct,
            device,
        )
        service = ExpertStoreService(store, Checkpoint.of(root, manifest), config.local_socket_path)
        with Readers(store, files), LocalSocket(config.local_socket_path, store):
            await _serve(config, store, service, until_stopped)
        sessions.stop()


async def _serve(
    config: ExpertStoreConfig,
    store: ExpertStore,
    service: ExpertStoreService,
    until_stopped: Callable[[], Awaitable[None]],
) -> None:
    with daemon.serving_metrics(store.snapshot, config.metrics_port, config.metrics_port_file):
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(resident_list.kept(store, config.resident_list))
            for face in config.faces:
                serving = rpc.serving(
                    face,
                    lambda server: add_ExpertStoreServicer_to_server(service, server),
                    [SERVICE_NAME],
                    config.stop_grace_s,
                    service.drain,
                    rpc.LOCAL_MESSAGE_BYTES,  # over the stream, too
                )
                await stack.enter_async_context(serving)
            facts = {
                "address": config.address,
                "experts": len(store.manifest.records),
                "slots": config.num_slots,
                "segment_bytes": store.segment.layout.segment_bytes,
                "huge_bytes": store.segment.huge_bytes,
                "device": type(store.device).__name__,
            }
            logger.info("ready", extra=facts)
            await until_stopped()


def main() -> int:
    return daemon.main("expert_store", __doc__ or "", ExpertStoreConfig.load, run)


if __name__ == "__main__":
    daemon.leave(main())
