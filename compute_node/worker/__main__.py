"""The worker daemon, which computes experts for main nodes on other boxes:
`python -m compute_node.worker --config flashmoe.toml`.
"""

from __future__ import annotations

from proto.process import last_words

if __name__ == "__main__":
    last_words.report_failed_imports("worker")

import proto.process.quiet_grpc  # noqa: F401  isort: skip  before grpc
import compute_node.model.lean_imports  # noqa: F401  isort: skip  before transformers

import gc
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from compute_node.boxes.box_facts import BoxFacts
from compute_node.cache.capacity import Capacity
from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.kernels import heap
from compute_node.kernels.prober import Prober
from compute_node.kernels.set_up import set_up
from compute_node.model.loaded import ExpertsOnly, load_experts
from compute_node.store.borrow import StoreClient
from compute_node.store.connect import connect_store
from compute_node.store.session import StoreDescription
from compute_node.worker.checkpoint import check_model, checkpoint_folder
from compute_node.worker.config import WorkerConfig
from compute_node.worker.direct_door import DirectDoor
from compute_node.worker.lent_experts import LentExperts
from compute_node.worker.service import SERVICE_NAME, WorkerService
from compute_node.worker.work_queue import WorkQueue
from proto import rpc, stats
from proto.expert import EXACT_VARIANT, ModelSpec
from proto.process import daemon
from proto.redis_schema import FALLBACK_POLICY

logger = logging.getLogger("worker")


async def run(config: WorkerConfig) -> None:
    """Serve until signalled. The order of lines is the order of start, reversed for stop."""
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)  # here: what this thread makes of tensors is small
    rpc.check_socket_free(config.address)
    with ExitStack() as stack:
        store = connect_store(config)
        stack.callback(store.close)
        description = store.describe()
        spec = description.spec
        check_model(config, description)
        cache = new_cache(config, description, store)
        cache.room.num_spare = description.num_spare
        prober = Prober(times=config.native == "auto")
        thread = stack.enter_context(ThreadPoolExecutor(1, "compute"))
        with checkpoint_folder(config, description) as model_dir:
            loaded = thread.submit(load, config, model_dir, spec, prober).result()
        thread.submit(cache.open).result()
        work = stack.enter_context(WorkQueue())
        stack.callback(thread.submit(work.run).result)
        stack.callback(work.stop)
        lent = LentExperts(loaded.kernels, spec.num_experts, cache, description.held)
        service = WorkerService(
            lent,
            spec,
            (loaded.hidden_size, loaded.dtype),
            cache.capacity.slots,
            work,
            lambda: stats.snapshot(
                lent,
                *(stats.labelled(one, layer=layer) for layer, one in cache.counters.items()),
                cache,
                cache.waits,
                store,
                BoxFacts.of(description.held, spec, cache.capacity.slots),
                description,
            ),
        )
        stack.enter_context(
            daemon.serving_metrics(service.snapshot, config.metrics_port, config.metrics_port_file)
        )
        if config.listen is not None and not config.listen.startswith("unix:"):
            door = DirectDoor(config.faces[-1], config.direct_port, service.take_in)
            service.direct_port = stack.enter_context(door).port
        gc.collect()
        gc.freeze()
        async with AsyncExitStack() as faces:
            for face in config.faces:
                await faces.enter_async_context(
                    rpc.serving(face, service.register, [SERVICE_NAME], config.stop_grace_s)
                )
            logger.info("ready", extra={"address": config.address, "slots": cache.capacity.slots})
            await rpc.until_signalled()


def new_cache(
    config: WorkerConfig, description: StoreDescription, store: StoreClient
) -> ExpertCache:
    """Not open yet. Nobody advises a worker: it evicts by decayed use."""
    spec, expert_bytes = description.spec, description.lease_bytes[EXACT_VARIANT]
    chooser = PolicyChooser(
        FALLBACK_POLICY,
        config.half_life_tokens,
        spec.moe_layers,
        spec.num_experts,
        lambda: None,
    )
    num_experts = description.num_experts
    slots, top_k = min(config.slots, num_experts), min(spec.top_k, num_experts)
    capacity = Capacity(slots * expert_bytes, expert_bytes, spec.moe_layers, top_k, pooled=True)
    return ExpertCache(store, capacity, chooser)


def load(config: WorkerConfig, model_dir: Path, spec: ModelSpec, prober: Prober) -> ExpertsOnly:
    """On the thread that computes, as a compute node does."""
    set_up(prober, config.threads, config.native, config.verdicts_path)
    loaded = load_experts(model_dir, spec, prober)
    heap.trim()
    return loaded


def main() -> int:
    return daemon.main("worker", __doc__ or "", WorkerConfig.load, run)


if __name__ == "__main__":
    daemon.leave(main())
