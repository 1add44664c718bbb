"""What a stack will be: its settings, its store, and where its memory goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deploy.plan.budget import MemoryPlan, plan_memory
from deploy.plan.lent_store import LentStore
from deploy.plan.parts import forecaster_room, router_map_room
from deploy.plan.room import check_machine
from deploy.plan.store_facts import StoreFacts
from deploy.settings import ServeSettings, parse_bytes
from deploy.stack.quality_check import check_quality
from deploy.stack.run_dir import RunDir
from deploy.terminal import console
from expert_store.manifest.manifest import MANIFEST_NAME, Manifest
from proto import errors
from proto.checkpoint.vocabulary import vocabulary_bytes
from proto.weight_format import EXACT


@dataclass(frozen=True)
class StackPlan:
    """A stack that fits into its ceiling.

    store_dir: of a store on this box; None: it is another's
    manifest: what is known of the store
    """

    settings: ServeSettings
    store_dir: Path | None
    manifest: StoreFacts
    memory: MemoryPlan

    @classmethod
    def of(cls, settings: ServeSettings) -> StackPlan:
        """Plan what the settings ask for. Prints the plan's warnings on stderr.

        Raises ConfigInvalid, ManifestInvalid, MemoryExceeded, InvalidRequest, QualityCardInvalid,
        and where the store is another box's what `LentStore.at` raises.
        """
        if settings.borrows_from is not None:
            return cls._borrowing(settings, settings.borrows_from)
        if settings.model is None:
            raise errors.ConfigInvalid("give --model STORE, or model in the [serve] table")
        manifest = load_store(settings.model)
        has_workers = settings.workers or settings.compute_node.get("workers_file")
        if settings.role == "shadow" or (settings.role == "main" and not has_workers):
            check_whole(settings.model, manifest)
        ceiling_bytes = _ceiling_bytes(settings)
        memory = plan_stack_memory(settings, settings.model, manifest, ceiling_bytes)
        about_quality = check_quality(
            settings, settings.model, manifest.spec.fingerprint, memory.experts_bytes
        )
        for warning in (*memory.warnings, *filter(None, [about_quality])):
            console.say(f"warning: {warning}")
        return cls(settings, settings.model, manifest, memory)

    @classmethod
    def _borrowing(cls, settings: ServeSettings, address: str) -> StackPlan:
        if settings.lend is not None:
            raise errors.ConfigInvalid(
                f"this box borrows from {address} and has no store to lend: leave --lend out"
            )
        store = LentStore.at(address, settings.store_tls, settings.store_deadline_s)
        memory = plan_memory(
            store,
            _ceiling_bytes(settings),
            settings.experts_memory,
            context_tokens=settings.context_tokens,
            chunk_tokens=settings.chunk_tokens(store.sizing),
            spare_bytes=0,
            role="worker",
            is_borrowed=True,
        )
        check_machine(memory.ceiling_bytes)
        return cls(settings, None, store, memory)

    @property
    def run_dir(self) -> RunDir:
        return RunDir(self.settings.run_dir.resolve())

    @property
    def model_name(self) -> str:
        """The architecture, and how its weights are kept unless as the checkpoint has them."""
        spec = self.manifest.spec
        exact = spec.weight_format == EXACT
        return spec.model_type if exact else f"{spec.model_type} in {spec.weight_format}"


def plan_stack_memory(
    settings: ServeSettings,
    store_dir: Path,
    manifest: Manifest,
    ceiling_bytes: int | None,
    *,
    is_here: bool = True,
) -> MemoryPlan:
    """The memory of a stack with these settings. ceiling_bytes: None without a ceiling; is_here: on
    this machine, which must have it

    Raises ConfigInvalid, MemoryExceeded.
    """
    is_borrowed = settings.borrows_from is not None
    spare_slots = 0 if is_borrowed else settings.spare_slots(manifest.slot_bytes)
    planned = plan_memory(
        manifest,
        ceiling_bytes,
        settings.experts_memory,
        context_tokens=settings.context_tokens,
        chunk_tokens=settings.chunk_tokens(manifest.sizing),
        spare_bytes=spare_slots * manifest.slot_bytes,
        embedded_valkey=settings.redis is None,
        serves_http=settings.http is not None,
        forecaster_bytes=forecaster_room(settings.forecaster(store_dir)),
        router_map_bytes=router_map_room(settings.router_map(store_dir)),
        vocabulary_bytes=vocabulary_bytes(manifest.root(store_dir, settings.source)),
        kv_memory_bytes=settings.kv_memory_bytes,
        role=settings.role,
        lent_bytes=settings.lent_slots * manifest.slot_bytes,
        is_borrowed=is_borrowed,
    )
    if is_here:
        check_machine(planned.ceiling_bytes)
    return planned


def _ceiling_bytes(settings: ServeSettings) -> int | None:
    return parse_bytes(settings.memory, "--memory") if settings.memory else None


def check_whole(store: Path, manifest: Manifest) -> None:
    """Raises ManifestInvalid for a store that has only a share of the model's experts."""
    if manifest.share is not None:
        raise errors.ManifestInvalid(
            f"{store} is {manifest.share}, with {manifest.num_experts} of "
            f"{manifest.spec.num_experts_total} experts: give a store that has all, or name "
            "workers that have the rest (--worker)"
        )


def load_store(store: Path) -> Manifest:
    """Raises ManifestInvalid with the command that makes a store of a checkpoint."""
    if not (store / MANIFEST_NAME).exists() and (store / "config.json").exists():
        raise errors.ManifestInvalid(
            f"{store} is a checkpoint, not a store: run `flashmoe index {store} --out DIR` first"
        )
    return Manifest.load(store)
