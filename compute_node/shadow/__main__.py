"""The shadow daemon, which runs ahead of main nodes with a small copy of the model:
`python -m compute_node.shadow --config flashmoe.toml`.
"""

from __future__ import annotations

from proto.process import last_words

if __name__ == "__main__":
    last_words.report_failed_imports("shadow")

import proto.process.quiet_grpc  # noqa: F401  isort: skip  before grpc
import compute_node.model.lean_imports  # noqa: F401  isort: skip  before transformers

import gc
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from compute_node.cache.capacity import Capacity
from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.kernels import heap
from compute_node.kernels.prober import Prober
from compute_node.kernels.set_up import set_up
from compute_node.model.loaded import LoadedModel, load_model
from compute_node.shadow.config import ShadowConfig
from compute_node.shadow.follower import Follower
from compute_node.shadow.naming import Named, NamingBackend
from compute_node.shadow.service import SERVICE_NAME, ShadowService
from compute_node.store.borrow import StoreClient
from compute_node.store.session import StoreDescription
from proto import errors, rpc, stats
from proto.expert import EXACT_VARIANT, ModelSpec
from proto.process import daemon
from proto.redis_schema import FALLBACK_POLICY

logger = logging.getLogger("shadow")


async def run(config: ShadowConfig) -> None:
    """Serve until signalled. The order of lines is the order of start, reversed for stop."""
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)  # here: what this thread makes of tensors is small
    rpc.check_socket_free(config.address)
    with ExitStack() as stack:
        store = StoreClient(
            config.store_address, config.node, config.slots, config.session_dir, config.deadline_s
        )
        stack.callback(store.close)
        description = store.describe()
        cache, named = new_cache(config, description, store), Named()
        prober = Prober(times=config.native == "auto")
        thread = stack.enter_context(ThreadPoolExecutor(1, "compute"))
        loaded = thread.submit(load, config, description, cache, prober, named).result()
        thread.submit(read_all, cache, description.spec).result()
        follower = Follower(loaded, named)
        service = ShadowService(
            follower,
            loaded,
            thread,
            lambda: stats.snapshot(
                follower,
                *(stats.labelled(one, layer=layer) for layer, one in cache.counters.items()),
                cache,
                cache.waits,
            ),
        )
        stack.enter_context(
            daemon.serving_metrics(service.snapshot, config.metrics_port, config.metrics_port_file)
        )
        gc.collect()
        gc.freeze()
        async with AsyncExitStack() as faces:
            for face in config.faces:
                await faces.enter_async_context(
                    rpc.serving(face, service.register, [SERVICE_NAME], config.stop_grace_s)
                )
            logger.info(
                "ready", extra={"address": config.address, "weights": description.model_dir}
            )
            await rpc.until_signalled()


def new_cache(
    config: ShadowConfig, description: StoreDescription, store: StoreClient
) -> ExpertCache:
    """Not open yet. Raises ConfigInvalid where not every expert has a slot: a shadow that waits for
    its disk is no help. Raises ManifestInvalid for a share of a model.
    """
    description.check_whole()
    spec, expert_bytes = description.spec, description.lease_bytes[EXACT_VARIANT]
    if config.slots < spec.num_experts_total:
        raise errors.ConfigInvalid(
            f"a shadow holds all {spec.num_experts_total} experts, and has memory for "
            f"{config.slots}: pack the model in fewer bits, or give it more memory"
        )
    chooser = PolicyChooser(FALLBACK_POLICY, 16.0, spec.moe_layers, spec.num_experts, lambda: None)
    num_bytes = spec.num_experts_total * expert_bytes
    capacity = Capacity(num_bytes, expert_bytes, spec.moe_layers, spec.top_k, pooled=True)
    return ExpertCache(store, capacity, chooser)


def read_all(cache: ExpertCache, spec: ModelSpec) -> None:
    """Before the first token. Raises StoreUnavailable, ExpertDamaged."""
    cache.open()
    for layer in spec.moe_layers:
        _, waves = cache.step(layer, range(spec.num_experts))
        for _ in waves:
            pass


def load(
    config: ShadowConfig,
    description: StoreDescription,
    cache: ExpertCache,
    prober: Prober,
    named: Named,
) -> LoadedModel:
    """On the thread that computes, as a compute node does."""
    set_up(prober, config.threads, config.native, config.verdicts_path)
    model_dir: Path = config.model_dir or description.model_dir
    loaded = load_model(
        model_dir,
        description.spec,
        cache,
        prober,
        around=lambda layer, local: NamingBackend(layer, local, named),
    )
    heap.trim()
    return loaded


def main() -> int:
    return daemon.main("shadow", __doc__ or "", ShadowConfig.load, run)


if __name__ == "__main__":
    daemon.leave(main())
