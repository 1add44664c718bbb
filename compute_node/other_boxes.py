"""What a main node has of other boxes: who owns which experts, links to workers and to a shadow."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from compute_node.boxes.boxes import Boxes
from compute_node.boxes.doubles import Doubles
from compute_node.boxes.joined import JOIN_S, Follower, joined
from compute_node.boxes.link import WorkerLink
from compute_node.boxes.owners import Owners, Rotation, Shares
from compute_node.boxes.probe import Probe
from compute_node.boxes.shadow_link import ShadowLink
from compute_node.boxes.workers_file import WorkerEntry
from compute_node.cache.expert_cache import ExpertCache
from compute_node.config import ComputeNodeConfig
from compute_node.engine.engine import Engine
from compute_node.model.loaded import LoadedModel
from compute_node.predict.named_reads import NamedReads
from compute_node.predict.shadowed import NAME as SHADOW
from compute_node.predict.shadowed import Shadowed
from compute_node.store.session import StoreDescription
from compute_node.worker.lent_experts import LentExperts
from proto.expert import ModelSpec
from proto.held_experts import HeldExperts

logger = logging.getLogger(__name__)


def new_boxes(
    config: ComputeNodeConfig, description: StoreDescription, own_slots: int
) -> Boxes | None:
    """Without a link. None: no others compute experts."""
    spec = description.spec
    if not config.has_boxes:
        return None

    def shares(slots: Sequence[float], held: Sequence[HeldExperts]) -> Shares:
        return Shares(spec.num_experts, slots, held)

    def rotation(slots: Sequence[float], held: Sequence[HeldExperts]) -> Rotation:
        return Rotation(spec.moe_layers, slots, config.groups or len(slots) - 1, held)

    def doubles(owners: Owners, slots: Sequence[int]) -> Doubles:
        return Doubles(spec.moe_layers, spec.num_experts, owners, slots)

    if config.placement == "shares":
        return Boxes(shares, own_slots, description.held, doubles)
    return Boxes(rotation, own_slots, description.held)


def probe_of(loaded: LoadedModel, cache: ExpertCache) -> Probe:
    """What a worker must give the same bits of. On the thread that computes."""
    spec = loaded.spec
    here = LentExperts(loaded.kernels, spec.num_experts, cache)
    return Probe.of(here.compute, spec, loaded.hidden_size, loaded.dtype)


@contextmanager
def linked(
    boxes: Boxes, config: ComputeNodeConfig, spec: ModelSpec, probe: Probe
) -> Iterator[None]:
    """To the workers of the settings and of the file, for the block.

    Raises VersionMismatch and OtherBits for one of the settings that cannot be used, ConfigInvalid
    when the file cannot be read.
    """

    def new_link(entry: WorkerEntry) -> WorkerLink:
        return WorkerLink(entry.address, spec, probe, config.worker_tls, entry.cost)

    with ExitStack() as stack:
        boxes.links = stack.enter_context(joined(config.workers, new_link))
        if config.workers_file:
            stack.enter_context(Follower(config.workers_file, boxes, new_link))
        boxes.warn_of_lacking(spec)
        yield


@contextmanager
def shadowed(engine: Engine, config: ComputeNodeConfig, address: str) -> Iterator[None]:
    """A shadow node names what decode steps will want, for the block. Raises VersionMismatch for
    one of another model.
    """
    loaded, spec = engine.loaded, engine.loaded.spec
    reads = NamedReads(SHADOW, engine.cache, loaded.prefetcher.foresight)
    shadow = Shadowed(spec.moe_layers, reads, config.shadow_align_tokens)
    with ShadowLink(address, spec, loaded.vocab_size, shadow.hear, config.worker_tls) as link:
        shadow.link = link
        if not link.wait_up(JOIN_S):
            logger.warning("shadow is away", extra={"shadow": address})
        engine.shadow = shadow
        yield
