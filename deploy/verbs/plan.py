"""The verb that tells whether a model fits, where its memory goes and how fast it decodes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from deploy.cluster import plan_page
from deploy.cluster.config import ClusterConfig
from deploy.cluster.planned import PlannedCluster
from deploy.plan.budget import MemoryPlan
from deploy.plan.disk import DiskSpeed, RecordSpeed, measure_disk, measure_records
from deploy.plan.estimate import Estimate, estimate, rotation
from deploy.plan.room import shortage
from deploy.plan.rotation import Rotation
from deploy.settings import ServeSettings, parse_bytes
from deploy.stack.stack_plan import check_whole, plan_stack_memory
from deploy.terminal import console, options
from deploy.terminal.imports import importing_torch
from deploy.terminal.progress import progress
from expert_store.manifest.manifest import MANIFEST_NAME, Manifest, check_sources
from expert_store.manifest.sources import resolve_inside
from proto import errors

_WORKER_S = 0.0008  # of a message to a worker and back, without the network


def plan(
    target: Annotated[Path, typer.Argument(metavar="HF_DIR|STORE", help="Checkpoint or store.")],
    memory: Annotated[
        str | None, typer.Option(help="Ceiling over everything, e.g. 8GiB. (required for one box)")
    ] = None,
    experts_memory: Annotated[
        str | None, typer.Option(help="Bytes, percent of experts, or slots.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Say what as many workers that take turns would give.")
    ] = 0,
    cluster: Annotated[
        Path | None,
        typer.Option(metavar="CLUSTER.toml", help="Boxes, in place of this one: who owns what."),
    ] = None,
    round_trip_ms: Annotated[
        float, typer.Option(min=0, help="To a worker and back, on the network.")
    ] = 0.3,
    worker_disk: Annotated[
        float | None,
        typer.Option(metavar="MB/S", min=1, help="Of each worker. (default: as measured here)"),
    ] = None,
    as_json: Annotated[bool, options.JSON] = False,
) -> None:
    """Tell whether a model fits a memory ceiling, where the memory goes, and how fast it should
    decode; or, of several boxes, which of them owns which experts.

    Example: flashmoe plan ~/stores/olmoe --memory 8GiB

    Example: flashmoe plan ~/stores/olmoe --cluster cluster.toml
    """
    link_s = round_trip_ms / 1e3 + _WORKER_S
    if cluster is not None:
        if memory or experts_memory or workers:
            raise errors.InvalidRequest(
                "--cluster names workers, and memory of each box: leave --memory, "
                "--experts-memory and --workers out"
            )
        _plan_cluster(target, cluster, link_s, worker_disk, as_json)
        return
    if memory is None:
        raise errors.InvalidRequest(
            "give --memory, for example 8GiB, or boxes by --cluster CLUSTER.toml"
        )
    if worker_disk is not None and not workers:
        raise errors.InvalidRequest("--worker-disk is of workers: give --workers or --cluster, too")
    settings = ServeSettings.load(None).model_copy(update={"experts_memory": experts_memory})
    ceiling_bytes = parse_bytes(memory, "--memory")
    with _store_of(target) as (store_dir, manifest):
        check_whole(target, manifest)
        root = manifest.root(store_dir)
        check_sources(manifest, root, times=False)
        planned = plan_stack_memory(settings, store_dir, manifest, ceiling_bytes)
        records = measure_records(manifest, root)
        disk = measure_disk([resolve_inside(root, file.path) for file in manifest.files])
    expected = estimate(manifest, planned, records)
    turns = _turns(manifest, planned, records, link_s, worker_disk)
    if as_json:
        document = _plan_document(manifest, planned, records, expected)
        if workers:
            document["rotation"] = {"workers": workers} | _rotation_document(turns, workers)
        console.print_json(document)
    else:
        _print_plan(manifest, planned, expected)
        if workers:
            title = f"{workers} workers in turn, each {_like_here(worker_disk)}"
            console.out.print(console.table(title, _rotation_rows(turns, workers)))
        console.out.print(console.table("The disk", _disk_rows(disk, records)))


def _turns(
    manifest: Manifest,
    planned: MemoryPlan,
    records: RecordSpeed,
    link_s: float,
    worker_disk: float | None,
) -> Rotation:
    """Of workers that have this machine's processor, and its disk unless one is given, in MB/s."""
    found = rotation(manifest, planned, records, link_s)
    return found if worker_disk is None else replace(found, disk_bytes_per_s=1e6 * worker_disk)


def _like_here(worker_disk: float | None) -> str:
    if worker_disk is None:
        return "with a disk and processor as here"
    return f"with a disk of {worker_disk:,.0f} MB/s and a processor as here"


def _plan_cluster(
    target: Path, file: Path, link_s: float, worker_disk: float | None, as_json: bool
) -> None:
    config = ClusterConfig.load(file, is_protected=False)
    with _store_of(target) as (store_dir, manifest):
        planned = PlannedCluster.of(config, store_dir, manifest)
        turns = None
        if planned.placement == "rotation" and config.workers:
            root = manifest.root(store_dir)
            check_sources(manifest, root, times=False)
            smallest = min(planned.boxes[1:], key=lambda box: box.slots)
            records = measure_records(manifest, root)
            turns = _turns(manifest, smallest.memory, records, link_s, worker_disk)
        elif worker_disk is not None:
            raise errors.InvalidRequest(
                "--worker-disk is of groups that take layers in turn: this cluster has none, leave "
                "it out"
            )
    groups = min(planned.num_groups, len(config.workers))
    if as_json:
        document = plan_page.document(planned)
        if turns is not None:
            document["rotation"] = _rotation_document(turns, groups, planned.group_size)
        console.print_json(document)
        return
    console.out.print(plan_page.boxes_table(planned))
    console.out.print(plan_page.layers_table(planned, manifest.spec.moe_layers))
    if turns is not None:
        title = f"{groups} groups in turn, each worker {_like_here(worker_disk)}"
        console.out.print(console.table(title, _rotation_rows(turns, groups, planned.group_size)))
    if lacking := planned.map.lacking:
        console.warn(
            f"no box has {len(lacking)} of {manifest.spec.num_experts_total:,} experts, the first "
            f"is {lacking[0]}: give a box a store with them"
        )


@contextmanager
def _store_of(target: Path) -> Iterator[tuple[Path, Manifest]]:
    """The store, or one that a checkpoint is indexed into, for the block; and its manifest."""
    with tempfile.TemporaryDirectory() as scratch:
        store_dir = target if (target / MANIFEST_NAME).exists() else Path(scratch)
        if store_dir != target:
            _index_for_plan(target, store_dir)
        yield store_dir, Manifest.load(store_dir)


def _index_for_plan(checkpoint: Path, store_dir: Path) -> None:
    with importing_torch():
        from expert_store.offline.index import index as make_index

    with progress("reading the checkpoint") as report:
        make_index(checkpoint, store_dir, report, console.warn)


def _plan_document(
    manifest: Manifest, planned: MemoryPlan, records: RecordSpeed, expected: Estimate
) -> dict[str, object]:
    return {
        "fits": True,
        "weight_format": asdict(manifest.spec.weight_format),
        "ceiling_bytes": planned.ceiling_bytes,
        "total_bytes": planned.total_bytes,
        "shortage": shortage(planned) or None,
        "warnings": list(planned.warnings),
        "memory_bytes_by_part": planned.parts,
        "slots": planned.slots,
        "num_experts": planned.num_experts,
        "disk": vars(records) | {"bytes_per_s": records.bytes_per_s},
        "tokens_per_s": {
            "low": expected.low_tokens_per_s,
            "likely": expected.likely_tokens_per_s,
            "high": expected.high_tokens_per_s,
        },
        "likely_hit_ratio": expected.likely_hit_ratio,
        "bytes_per_token": expected.bytes_per_token,
    }


def _rotation_document(turns: Rotation, groups: int, size: int = 1) -> dict[str, object]:
    """size: workers of a group"""
    return {
        "tokens_per_s": {
            "token_unforeseen": 1 / turns.seconds(groups, size),
            "token_foreseen": 1 / turns.seconds(groups, size, knows_next=True),
            "without_disks": 1 / turns.ideal_s(size),
        },
        "workers_enough": turns.enough(),
    }


def _rotation_rows(turns: Rotation, groups: int, size: int = 1) -> dict[str, str]:
    unforeseen, foreseen = (turns.seconds(groups, size, one) for one in (False, True))
    enough = turns.enough()
    return {
        "tokens/s": f"{1 / unforeseen:.2f} where a token is not foreseen, {1 / foreseen:.2f} where "
        f"it is; {1 / turns.ideal_s(size):.2f} if no disk were waited for",
        "enough": "no number up to 64: the disks are too slow"
        if enough is None
        else f"with {enough} no disk is waited for",
    }


_PARTS = {
    "dense_weights": "dense weights",
    "kv_cache": "state of requests and kept prompts",
    "prefill_buffers": "buffers of prompts",
    "tokenizer": "tokenizer",
    "grammar": "holding answers to a schema",
    "spare_slots": "slots for reads under way",
    "compute_node": "compute node itself",
    "expert_store": "expert store itself",
    "scheduler": "scheduler",
    "launcher": "launcher",
    "valkey": "Valkey",
    "experts": "experts",
}


def _print_plan(manifest: Manifest, planned: MemoryPlan, expected: Estimate) -> None:
    rows = {_PARTS.get(name, name): console.size(part) for name, part in planned.parts.items()}
    rows["total"] = (
        f"{console.size(planned.total_bytes)} of {console.size(planned.ceiling_bytes)}: fits"
    )
    if problem := shortage(planned):
        rows["now"] = problem
    console.out.print(console.table("Memory", rows))
    for warning in planned.warnings:
        console.warn(warning)
    share = planned.slots / planned.num_experts
    speed = {
        "weights": str(manifest.spec.weight_format),
        "experts in memory": f"{planned.slots:,} of {planned.num_experts:,} ({share:.1%})",
        "tokens/s": _speed(expected),
        "read per token": _reads(expected),
    }
    console.out.print(console.table(f"Expected of {manifest.spec.model_type}", speed))


def _speed(expected: Estimate) -> str:
    low, likely, high = (
        f"{tokens_per_s:.1f}"
        for tokens_per_s in (
            expected.low_tokens_per_s,
            expected.likely_tokens_per_s,
            expected.high_tokens_per_s,
        )
    )
    if low == high:
        return f"about {likely}"
    return (
        f"about {likely}, between {low} and {high}: how often text returns to the same experts is "
        "not known before a run"
    )


def _reads(expected: Estimate) -> str:
    if not expected.bytes_per_token:
        return "nothing once every expert was used: all are kept"
    return (
        f"about {console.size(expected.bytes_per_token)}, if {expected.likely_hit_ratio:.0%} of "
        "the experts used are in memory"
    )


def _disk_rows(disk: DiskSpeed, records: RecordSpeed) -> dict[str, str]:
    return {
        "disk": str(disk),
        "an expert": f"{console.size(records.record_bytes)} in {records.median_s * 1e3:.2f} ms "
        f"({records.p10_s * 1e3:.2f} to {records.p90_s * 1e3:.2f}), its check included",
    }
