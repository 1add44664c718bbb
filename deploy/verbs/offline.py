"""Verbs that need no running stack: index, pack, verify, plan."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from deploy.plan.budget import MemoryPlan, forecaster_room, plan_memory, shortage
from deploy.plan.disk import DiskSpeed, RecordSpeed, measure_disk, measure_records
from deploy.plan.estimate import Estimate, estimate
from deploy.settings import ServeSettings, parse_bytes
from deploy.terminal import console
from deploy.terminal.imports import importing
from deploy.terminal.progress import progress
from expert_store.manifest.manifest import MANIFEST_NAME, Manifest, check_sources
from expert_store.manifest.sources import resolve_inside
from proto import errors

PackFormat = Literal["exact", "lossless", "bf16", "int8", "int4"]  # proto.weight_format.NAMES
CHECKPOINT = typer.Argument(metavar="HF_DIR", help="Folder of a Hugging Face checkpoint.")
STORE = typer.Argument(metavar="STORE", help="Folder made by `flashmoe index` or `pack`.")
OUT = typer.Option("--out", metavar="STORE", help="Folder to write.")
FORMAT = typer.Option("--format", help="How experts are kept; exact: as the checkpoint has them.")
SOURCE = typer.Option(help="Where the checkpoint's files are now, if they moved.")


def index(checkpoint: Annotated[Path, CHECKPOINT], out: Annotated[Path, OUT]) -> None:
    """Write a manifest over a checkpoint in place: no copy of its weights.

    Reads every byte once for the checksums; interrupted, it goes on where it was.

    Example: flashmoe index ~/models/OLMoE-1B-7B --out ~/stores/olmoe
    """
    with importing():
        from compute_node.model import lean_imports  # noqa: F401  before torch, whose imports it halves
        from expert_store.offline.index import index as make_index
        from expert_store.offline.index import is_indexed

    if is_indexed(checkpoint, out):
        console.err.print(f"{out} is up to date")
        return
    with progress("indexing") as report:
        manifest = make_index(checkpoint, out, report, _warn)
    _say_written(manifest, out)


def pack(
    checkpoint: Annotated[Path, CHECKPOINT],
    out: Annotated[Path, OUT],
    weight_format: Annotated[PackFormat, FORMAT] = "exact",
    overwrite: Annotated[bool, typer.Option(help="Replace STORE if it exists.")] = False,
) -> None:
    """Copy a checkpoint into aligned records that read fastest; STORE is then self-contained.

    Memory use is bounded; killed, it resumes; a full disk leaves STORE as it was. lossless keeps
    every bit of bf16 experts in three quarters of the bytes. int8 and int4 are lossy: `flashmoe
    eval` tells by how much. gpt-oss as its vendor ships it (mxfp4) becomes bf16,
    the same values, or int4.

    Example: flashmoe pack ~/models/OLMoE-1B-7B --out /nvme/olmoe-int4 --format int4
    """
    with importing():
        from compute_node.model import lean_imports  # noqa: F401  before torch, whose imports it halves
        from expert_store.offline.pack import pack as make_pack

    with progress("packing") as report:
        manifest = make_pack(
            checkpoint, out, report, _warn, weight_format=weight_format, overwrite=overwrite
        )
    _say_written(manifest, out)


def verify(store: Annotated[Path, STORE], source: Annotated[Path | None, SOURCE] = None) -> None:
    """Read and check every expert and dense weight; name each damaged one, then exit 1.

    Example: flashmoe verify ~/stores/olmoe
    """
    from expert_store.offline.verify import verify as check

    with progress("verifying") as report:
        damage = check(store, source, report)
    for item in damage:
        console.out.print(f"{item.name} in {item.file}: {item.problem}")
    if damage:
        console.err.print(
            f"{len(damage)} damaged: restore the files named above, then verify again"
        )
        raise typer.Exit(console.DAMAGED)
    console.out.print(f"{store}: every expert and weight is as it was indexed")


def plan(
    target: Annotated[Path, typer.Argument(metavar="HF_DIR|STORE", help="Checkpoint or store.")],
    memory: Annotated[str, typer.Option(help="Ceiling over everything, e.g. 8GiB.")],
    experts_memory: Annotated[
        str | None, typer.Option(help="Bytes, percent of experts, or slots.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Tell whether a model fits a memory ceiling, where the memory goes, and how fast it should
    decode.

    Example: flashmoe plan ~/stores/olmoe --memory 8GiB
    """
    settings = ServeSettings.load(None)
    ceiling_bytes = parse_bytes(memory, "--memory")
    with tempfile.TemporaryDirectory() as scratch:
        store_dir = target if (target / MANIFEST_NAME).exists() else Path(scratch)
        if store_dir != target:
            _index_for_plan(target, store_dir)
        manifest = Manifest.load(store_dir)
        root = manifest.root(store_dir)
        check_sources(manifest, root, times=False)
        planned = plan_memory(
            manifest,
            ceiling_bytes,
            experts_memory,
            context_tokens=settings.context_tokens,
            chunk_tokens=settings.chunk_tokens(manifest.sizing),
            spare_slots=settings.spare_slots(manifest.slot_bytes),
            embedded_valkey=settings.redis is None,
            forecaster_bytes=forecaster_room(settings.forecaster(store_dir)),
        )
        records = measure_records(manifest, root)
        disk = measure_disk([resolve_inside(root, file.path) for file in manifest.files])
    expected = estimate(manifest, planned, records)
    if as_json:
        console.print_json(_plan_document(manifest, planned, records, expected))
    else:
        _print_plan(manifest, planned, expected)
        console.out.print(console.table("The disk", _disk_rows(disk, records)))


def _index_for_plan(checkpoint: Path, store_dir: Path) -> None:
    with importing():
        from compute_node.model import lean_imports  # noqa: F401  before torch, whose imports it halves
        from expert_store.offline.index import index as make_index

    with progress("reading the checkpoint") as report:
        make_index(checkpoint, store_dir, report, _warn)


def _warn(sentence: str) -> None:
    console.err.print(f"flashmoe: {sentence}")


def _say_written(manifest: Manifest, out: Path) -> None:
    spec = manifest.spec
    console.out.print(
        f"{out}: {spec.model_type}, {len(spec.moe_layers)} MoE layers x {spec.num_experts} "
        "experts, "
        f"{console.size(manifest.expert_bytes_total)} of experts, "
        f"{console.size(manifest.sizing.dense_bytes)} dense, weights {spec.weight_format}"
    )


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


_PARTS = {
    "dense_weights": "dense weights",
    "kv_cache": "cache of the context",
    "prefill_buffers": "buffers of prompts",
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
        _warn(warning)
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


def load_store(store: Path) -> Manifest:
    """Raises ManifestInvalid with the command that makes a store of a checkpoint."""
    if not (store / MANIFEST_NAME).exists() and (store / "config.json").exists():
        raise errors.ManifestInvalid(
            f"{store} is a checkpoint, not a store: run `flashmoe index {store} --out DIR` first"
        )
    return Manifest.load(store)
