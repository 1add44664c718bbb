"""The compute_node daemon: `python -m compute_node --config flashmoe.toml`."""

from __future__ import annotations

from proto.process import last_words

if __name__ == "__main__":
    last_words.report_failed_imports("compute_node")

import proto.process.quiet_grpc  # noqa: F401  isort: skip  before grpc
import compute_node.model.lean_imports  # noqa: F401  isort: skip  before transformers

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import redis
import torch
from redis.backoff import NoBackoff
from redis.retry import Retry
from transformers.utils import logging as transformers_logging

from compute_node import other_boxes
from compute_node.boxes.boxes import Boxes
from compute_node.cache.capacity import Capacity
from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.policies.heard import Heard
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.config import ComputeNodeConfig
from compute_node.engine.ahead import new_run_ahead
from compute_node.engine.compute_thread import ComputeThread
from compute_node.engine.engine import Engine
from compute_node.engine.kept import KeptPrompts
from compute_node.engine.kv_room import KvRoom
from compute_node.engine.schedule import Schedule
from compute_node.engine.turns import Meter
from compute_node.evidence import learning
from compute_node.evidence.advice import AdviceFeed
from compute_node.evidence.log import AccessLog
from compute_node.evidence.step import Evidence
from compute_node.face.service import SERVICE_NAME, ComputeNodeService
from compute_node.face.stats import NodeStats
from compute_node.kernels import heap, processors
from compute_node.kernels.prober import Prober
from compute_node.kernels.set_up import set_up
from compute_node.model.loaded import LoadedModel, load_model
from compute_node.model.lookahead import Lookahead
from compute_node.moe.owned import OwnedBackend
from compute_node.predict.router_map import RouterMap
from compute_node.quality.guards import Guards
from compute_node.store.borrow import StoreClient
from compute_node.store.connect import connect_store
from compute_node.store.session import StoreDescription
from proto import correction, rpc
from proto.compute_node_pb2_grpc import add_ComputeNodeServicer_to_server
from proto.expert import EXACT_VARIANT, ModelSpec
from proto.process import daemon
from proto.quality import Budget, QualityCard

logger = logging.getLogger("compute_node")

REDIS_TIMEOUT_S = 1.0


async def run(config: ComputeNodeConfig) -> None:
    """Serve until signalled. The order of lines is the order of start, reversed for stop."""
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)  # here: what this thread makes of tensors is small
    rpc.check_socket_free(config.address)
    with ExitStack() as stack:
        store = connect_store(config)
        stack.callback(store.close)
        description = store.describe()
        spec = description.spec
        access_log, advice = stack.enter_context(learning_from(config, spec.fingerprint))
        cache = new_cache(config, description, store, advice)
        model_dir = config.model_dir or description.model_dir
        lookahead = Lookahead(
            config.prefetch_depth if config.transport == "shared_memory" else 0,
            description.num_spare,
            description.piece_bytes,
            router_map_of(config, spec),
        )
        prober = Prober(times=config.native == "auto")

        def idle(has_work: Callable[[], bool]) -> None:
            cache.let_go_if_lost()
            prober.prove_put_off(has_work)

        if config.verdicts_path:  # once more when nothing computes: prompts were seen meanwhile
            stack.callback(prober.save, config.verdicts_path)
        room = KvRoom(
            config.kv_bytes or 0,
            config.kv_bytes_per_token or 0,
            config.kv_bytes_fixed or 0,
            config.max_sequences,
            KeptPrompts(config.kept_states),
        )
        schedule = Schedule(config.max_queued_requests, room)
        compute = stack.enter_context(
            ComputeThread(
                schedule, idle, config.stop_grace_s, config.max_stall_s, config.max_turn_tokens
            )
        )
        boxes = other_boxes.new_boxes(config, description, cache)
        loaded = compute.do(lambda: load(config, model_dir, spec, cache, prober, lookahead, boxes))
        compute.do(cache.open)
        slots, chooser = cache.capacity.slots, cache.chooser
        evidence = None
        if access_log:
            evidence = Evidence(
                access_log, spec, config.node, slots, config.scope, lambda: chooser.name
            )
        cache.room.num_spare = description.num_spare
        setting = config.run_ahead if config.transport == "shared_memory" else "off"
        run_ahead = new_run_ahead(loaded, cache, setting)
        engine = Engine(
            loaded,
            cache,
            model_dir,
            config.max_context_tokens,
            config.prefill_chunk_tokens,
            evidence,
            run_ahead,
            room,
        )
        stack.enter_context(other_boxes.joined(engine, config, boxes, compute))
        compute.turns.meter = Meter(
            lambda: sum(one.misses for one in cache.counters.values()), lambda: cache.waits.read_s
        )
        guards = Guards(quality_card_of(config, spec), engine.limits.check_route)
        check_default(config, guards)
        stats = NodeStats(engine, compute, store, access_log, advice, guards, boxes)
        service = ComputeNodeService(engine, compute, stats, guards, config.quality)
        stack.enter_context(
            daemon.serving_metrics(stats.snapshot, config.metrics_port, config.metrics_port_file)
        )
        gc.collect()
        gc.freeze()  # a full collection would walk all of transformers: 0.2 s within some token
        async with (
            rpc.serving(
                config.listen,
                lambda server: add_ComputeNodeServicer_to_server(service, server),
                [SERVICE_NAME],
                config.stop_grace_s,
                compute.drain,
            ) as health,
            health.learning(lambda: learning.obstacle(access_log, advice)),
        ):
            facts = {"slots": slots, "threads": config.threads or processors.usable()}
            logger.info("ready", extra={"address": config.address, **facts})
            await rpc.until_signalled()


@contextmanager
def learning_from(
    config: ComputeNodeConfig, fingerprint: str
) -> Iterator[tuple[AccessLog | None, AdviceFeed | None]]:
    """Evidence that leaves for the scheduler, and its advice, for the block; neither without
    Redis.
    """
    if not config.redis_url:
        yield None, None
        return
    with closing(connect_redis(config.redis_url)) as client:
        feed = AdviceFeed(client, fingerprint, config.node, config.advice_poll_s)
        with AccessLog(client, fingerprint) as access_log, feed as advice:
            yield access_log, advice


def new_cache(
    config: ComputeNodeConfig,
    description: StoreDescription,
    store: StoreClient,
    advice: AdviceFeed | None,
) -> ExpertCache:
    """Not open yet. Raises ManifestInvalid for a share of a model where no other box has the
    rest.
    """
    if not config.has_boxes:
        description.check_whole()
    spec, expert_bytes = description.spec, description.lease_bytes[EXACT_VARIANT]
    chooser = PolicyChooser(
        config.policy,
        config.half_life_tokens,
        spec.moe_layers,
        spec.num_experts,
        advice.fresh if advice else lambda: None,
        heard_since_advice(config, spec) if advice else None,
        config.weighs,
    )
    capacity_bytes = min(config.slots, description.num_experts) * expert_bytes
    is_pooled = config.scope == "pool"
    shares_slots = is_pooled and config.transport == "shared_memory"
    small_bytes = description.lease_bytes[spec.small_variant] if shares_slots else expert_bytes
    capacity = Capacity(
        capacity_bytes,
        expert_bytes,
        spec.moe_layers,
        spec.top_k,
        is_pooled,
        expert_bytes // small_bytes,
    )
    return ExpertCache(store, capacity, chooser)


def heard_since_advice(config: ComputeNodeConfig, spec: ModelSpec) -> Heard | None:
    """What corrects advice, if anything was calibrated. Raises ForecasterInvalid,
    FileNotFoundError.
    """
    if config.forecaster_path is None:
        return None
    shape = (len(spec.moe_layers), spec.num_experts)
    return Heard(correction.load(config.forecaster_path, spec.fingerprint, shape), spec.top_k)


def router_map_of(config: ComputeNodeConfig, spec: ModelSpec) -> RouterMap | None:
    """What was learned about the routers, if anything was calibrated. Raises RouterMapInvalid,
    FileNotFoundError.
    """
    if config.router_map_path is None:
        return None
    return RouterMap.load(config.router_map_path, spec.fingerprint, spec.num_experts)


def quality_card_of(config: ComputeNodeConfig, spec: ModelSpec) -> QualityCard | None:
    """What was measured of lossy routes, if anything was. Raises QualityCardInvalid,
    FileNotFoundError.
    """
    if config.quality_path is None:
        return None
    return QualityCard.load(config.quality_path, spec.fingerprint)


def check_default(config: ComputeNodeConfig, guards: Guards) -> None:
    """Raises InvalidRequest for a default budget that no request could keep."""
    budget = Budget.parse(config.quality)
    if budget.fraction:
        guards.of(budget)


def load(
    config: ComputeNodeConfig,
    model_dir: Path,
    spec: ModelSpec,
    cache: ExpertCache,
    prober: Prober,
    lookahead: Lookahead,
    boxes: Boxes | None,
) -> LoadedModel:
    """On the thread that computes."""
    set_up(prober, config.threads, config.native, config.verdicts_path)
    around = None
    if boxes is not None:
        around = partial(OwnedBackend, boxes=boxes, deadline_s=config.deadline_s)
    loaded = load_model(model_dir, spec, cache, prober, lookahead, around)
    if lookahead.router_map is not None and config.router_map_path is not None:
        lookahead.router_map.check_reads(config.router_map_path, loaded.hidden_size)
    if config.verdicts_path:
        prober.save(config.verdicts_path)
    heap.trim()  # a tokenizer leaves ten times its file
    return loaded


def connect_redis(url: str) -> redis.Redis:
    """A client that never tries again by itself: who uses it counts what fails, and waits."""
    return redis.Redis.from_url(
        url,
        socket_connect_timeout=REDIS_TIMEOUT_S,
        socket_timeout=REDIS_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
    )


def main() -> int:
    return daemon.main("compute_node", __doc__ or "", ComputeNodeConfig.load, run)


if __name__ == "__main__":
    daemon.leave(main())
