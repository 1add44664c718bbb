"""What a main node has of other boxes: who owns which experts, links to workers and to a shadow."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from compute_node.boxes.boxes import Boxes
from compute_node.boxes.doubles import Doubles
from compute_node.boxes.file_watch import FileWatch
from compute_node.boxes.joined import JoinedWorkers, NewLink
from compute_node.boxes.link import WorkerLink
from compute_node.boxes.owners import Owners, placed
from compute_node.boxes.probe import Probe
from compute_node.boxes.shadow_link import ShadowLink
from compute_node.boxes.workers_file import WorkerEntry, WorkersFile
from compute_node.cache.expert_cache import ExpertCache
from compute_node.config import ComputeNodeConfig
from compute_node.engine.compute_thread import ComputeThread
from compute_node.engine.engine import Engine
from compute_node.engine.joined_shadow import JoinedShadow
from compute_node.model.loaded import LoadedModel
from compute_node.predict.named_reads import NamedReads
from compute_node.predict.shadowed import NAME as SHADOW
from compute_node.predict.shadowed import Shadowed
from compute_node.store.session import StoreDescription
from compute_node.worker.lent_experts import LentExperts
from proto import errors
from proto.held_experts import HeldExperts

logger = logging.getLogger(__name__)


def new_boxes(
    config: ComputeNodeConfig, description: StoreDescription, cache: ExpertCache
) -> Boxes | None:
    """Without a link. None: no others compute experts."""
    spec = description.spec
    if not config.has_boxes:
        return None

    def owners(slots: Sequence[float], held: Sequence[HeldExperts]) -> Owners:
        layers, num_experts = spec.moe_layers, spec.num_experts
        return placed(config.placement, layers, num_experts, slots, held, config.groups)

    def doubles(owners: Owners, slots: Sequence[int]) -> Doubles:
        return Doubles(spec.moe_layers, spec.num_experts, owners, slots)

    own_slots, held = cache.capacity.slots, description.held
    if config.placement == "rotation":
        return Boxes(owners, own_slots, held)
    here = cache if config.placement == "cheapest" else None
    return Boxes(owners, own_slots, held, doubles, here)


@contextmanager
def joined(
    engine: Engine, config: ComputeNodeConfig, boxes: Boxes | None, compute: ComputeThread
) -> Iterator[None]:
    """With the workers and the shadow of settings and file, for the block; with those of the file
    as long as it names them.

    Raises VersionMismatch and OtherBits for one of the settings that cannot be used, ConfigInvalid
    for a file that cannot be read or that names a shadow beside that of the settings.
    """
    with ExitStack() as stack:
        shadow = stack.enter_context(JoinedShadow(engine, partial(new_shadow, engine, config)))
        if boxes is not None:
            new_link = new_links(engine, config, compute)
            workers = stack.enter_context(JoinedWorkers(boxes, new_link, config.workers))
            if config.workers_file is not None:
                take = partial(take_file, config=config, workers=workers, shadow=shadow)
                stack.enter_context(FileWatch(config.workers_file, take))
                wait_up(workers, shadow)
            boxes.warn_of_lacking(engine.loaded.spec)
            engine.cache.elsewhere = boxes
        if config.shadow_address is not None:
            shadow.take(config.shadow_address)
            shadow.wait_up()
        yield


def take_file(
    file: WorkersFile, config: ComputeNodeConfig, workers: JoinedWorkers, shadow: JoinedShadow
) -> None:
    """Have the boxes that it names. Raises ConfigInvalid for a second shadow."""
    if config.shadow_address is None:
        shadow.take(file.shadow_address)
    elif file.shadow is not None:
        raise errors.ConfigInvalid(
            f"{config.workers_file} names the shadow {file.shadow_address}, and shadow_address is "
            f"{config.shadow_address}: keep one of them"
        )
    workers.take(file.workers)


def wait_up(workers: JoinedWorkers, shadow: JoinedShadow) -> None:
    """For those of a file, at the start. One that cannot be used is logged."""
    workers.wait_up()
    try:
        shadow.wait_up()
    except errors.VersionMismatch as error:
        logger.error("shadow refused", extra={"reason": str(error)})


def new_links(engine: Engine, config: ComputeNodeConfig, compute: ComputeThread) -> NewLink:
    """What opens a link to a worker, which is tried out before it is given work."""
    spec = engine.loaded.spec
    probe = compute.do(lambda: probe_of(engine.loaded, engine.cache))

    def new_link(entry: WorkerEntry) -> WorkerLink:
        return WorkerLink(entry.address, spec, probe, config.worker_tls, entry.cost)

    return new_link


def probe_of(loaded: LoadedModel, cache: ExpertCache) -> Probe:
    """What a worker must give the same bits of. On the thread that computes."""
    spec = loaded.spec
    here = LentExperts(loaded.kernels, spec.num_experts, cache)
    return Probe.of(here.compute, spec, loaded.hidden_size, loaded.dtype)


def new_shadow(engine: Engine, config: ComputeNodeConfig, address: str) -> Shadowed:
    """Names what decode steps will want. Its link is not open."""
    loaded, spec = engine.loaded, engine.loaded.spec
    reads = NamedReads(SHADOW, engine.cache, loaded.prefetcher.foresight)
    shadow = Shadowed(spec.moe_layers, reads, config.shadow_align_tokens)
    shadow.link = ShadowLink(address, spec, loaded.vocab_size, shadow.hear, config.worker_tls)
    return shadow
