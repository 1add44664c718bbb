"""What the boxes of cluster.toml will hold and own, before any of them runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from compute_node.boxes.owners import PlacementName
from deploy.cluster.box import AnyBox, MainBox, ShadowBox, WorkerBox
from deploy.cluster.config import ClusterConfig
from deploy.cluster.order import Order
from deploy.plan.budget import MemoryPlan
from deploy.plan.owners_map import Holder, Model, OwnersMap, placement_of
from deploy.settings import ServeSettings, parse_bytes
from deploy.stack.stack_plan import plan_stack_memory
from expert_store.manifest.manifest import MANIFEST_NAME, Manifest
from expert_store.manifest.share import Share
from proto import errors


@dataclass(frozen=True)
class PlannedBox:
    """store: what of the model's experts it has, in words; memory: of its stack"""

    name: str
    store: str
    memory: MemoryPlan

    @property
    def slots(self) -> int:
        return self.memory.slots


@dataclass(frozen=True)
class PlannedCluster:
    """boxes: those that compute experts, the main one first, as those of the map
    num_groups: of a rotation
    shadow:     None: there is none, or its store is not here
    """

    boxes: Sequence[PlannedBox]
    map: OwnersMap
    placement: PlacementName
    num_groups: int
    shadow: PlannedBox | None = None

    @property
    def group_size(self) -> int:
        """Workers of a group, at most."""
        return -(-(len(self.boxes) - 1) // max(1, self.num_groups))

    @classmethod
    def of(cls, config: ClusterConfig, store_dir: Path, manifest: Manifest) -> Self:
        """By the memory plan and the owners that the boxes themselves will go by. store_dir: where
        the manifest of the cluster's model is

        Raises ConfigInvalid, ManifestInvalid, InvalidRequest, and MemoryExceeded for the first box
        that does not hold what it must.
        """
        boxes, holders = list[PlannedBox](), list[Holder]()
        owners: tuple[MainBox | WorkerBox, ...] = (config.main, *config.workers)
        for box in owners:
            lender = config.lender_of(box)
            own, store = _store_of(lender or box, store_dir, manifest)
            store = store if lender is None else f"none: {store} of {lender.name}"
            memory = _memory(config, box, store_dir, own)
            boxes.append(PlannedBox(box.name, store, memory))
            holders.append(Holder(box.name, memory.slots, box.cost, own.held))
        node = _settings(config, config.main).compute_node
        placement = placement_of(str(node.get("placement", "shares")))
        num_groups = int(node.get("groups", 0))
        spec = manifest.spec
        model = Model(spec.moe_layers, spec.num_experts, manifest.slot_bytes)
        found = OwnersMap.of(model, holders, placement, num_groups, doubles=True)
        shadow = _shadow(config, config.shadow) if config.shadow is not None else None
        return cls(boxes, found, placement, num_groups or len(config.workers), shadow)


def _store_of(
    box: MainBox | WorkerBox, store_dir: Path, manifest: Manifest
) -> tuple[Manifest, str]:
    """Its store's manifest, and what it has. Raises ManifestInvalid."""
    if (share := box.share_of_model) is not None:
        own = _share_of(manifest, share, store_dir, box.name)
    elif box.model is not None and _is_store(box.model):
        own = Manifest.load(box.model.expanduser())
        if own.spec.fingerprint != manifest.spec.fingerprint:
            raise errors.ManifestInvalid(
                f"box {box.name}: {box.model} is a store of another model than {store_dir}"
            )
    else:
        is_assumed = box.model is not None
        return manifest, f"{_words(manifest)}{', supposed: it is not here' if is_assumed else ''}"
    return own, _words(own)


def _is_store(folder: Path) -> bool:
    return (folder.expanduser() / MANIFEST_NAME).exists()


def _words(manifest: Manifest) -> str:
    return "all experts" if manifest.share is None else f"{manifest.share}"


def _share_of(manifest: Manifest, share: Share, store_dir: Path, box: str) -> Manifest:
    """As `flashmoe shard` makes it. Raises ManifestInvalid."""
    if manifest.share == share:
        return manifest
    if manifest.share is not None:
        raise errors.ManifestInvalid(
            f"{store_dir} is {manifest.share}, box {box} has {share}: give a store that has all "
            "experts"
        )
    keys = share.experts(manifest.spec)
    records = {key: one for key, one in manifest.records.items() if key.expert in keys}
    return replace(manifest, share=share, records=records)


def _shadow(config: ClusterConfig, box: ShadowBox) -> PlannedBox | None:
    """None: its store is not here, and nothing else says how large its experts are."""
    if not _is_store(box.model):
        return None
    store_dir = box.model.expanduser()
    manifest = Manifest.load(store_dir)
    words = f"all experts in {manifest.spec.weight_format}"
    return PlannedBox(box.name, words, _memory(config, box, store_dir, manifest))


def _memory(config: ClusterConfig, box: AnyBox, store_dir: Path, manifest: Manifest) -> MemoryPlan:
    settings = _settings(config, box)
    ceiling_bytes = parse_bytes(str(settings.memory), "memory")
    try:
        return plan_stack_memory(settings, store_dir, manifest, ceiling_bytes, is_here=False)
    except (errors.MemoryExceeded, errors.ConfigInvalid) as error:
        raise type(error)(f"box {box.name}: {error}") from error


def _settings(config: ClusterConfig, box: AnyBox) -> ServeSettings:
    """As the box will read them, but for where its checkpoint is."""
    document = Order.of(config, box).settings
    try:
        settings = ServeSettings.of(document).model_copy(update={"source": None})
    except ValidationError as error:
        raise errors.ConfigInvalid.of(f"box {box.name}", error) from error
    if isinstance(box, MainBox):
        return settings
    return settings.of_helper("shadow" if isinstance(box, ShadowBox) else "worker")
