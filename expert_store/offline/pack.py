"""A checkpoint -> a self-contained store: aligned records, dense weights, config, tokenizer.
Offline, resumable.

Everything is written beside the target and moved there at the end, so the target is whole or as
it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from expert_store.manifest.manifest import Manifest
from expert_store.offline.card import Card
from expert_store.offline.checkpoint.architecture import remarks
from expert_store.offline.checkpoint.files import Checkpoint
from expert_store.offline.checkpoint.opened import open_checkpoint
from expert_store.offline.checkpoint.parameters import Part
from expert_store.offline.checkpoint.progress import Report, Warn, silent, unheard
from expert_store.offline.companions import copy_side_files, write_dense
from expert_store.offline.formats.table import FORMATS
from expert_store.offline.formats.weight_source import WeightSource
from expert_store.offline.index import make_spec, measure
from expert_store.offline.pack_target import (
    check_space,
    check_target,
    disk_full_explained,
    publish,
    written_files,
)
from expert_store.offline.record_file import JOURNAL_NAME, record_file
from expert_store.offline.records import RecordWriter
from proto.expert import EXACT_VARIANT
from proto.weight_format import EXACT


def pack(
    root: Path,
    store_dir: Path,
    report: Report = silent,
    warn: Warn = unheard,
    *,
    weight_format: str = EXACT.name,
    variants: Sequence[str] = (),
    overwrite: bool = False,
) -> Manifest:
    """Write a packed store of the checkpoint in `root` to `store_dir`.

    weight_format: of the records that a model computes with, one of proto.weight_format.NAMES
    variants: formats of further records of each expert, none of them larger; a variant has the name
              of its format

    Holds one tensor in memory at a time; of formats that are not exact, one expert's matrix and
    what it is encoded with. Killed and started again, it goes on where it was.
    Raises CheckpointUnsupported, ManifestInvalid (source damaged, disk full: the target is as it
    was).
    """
    root = root.resolve()
    store_dir = check_target(root, store_dir, overwrite)
    checkpoint, architecture = open_checkpoint(root, warn)
    partial = store_dir.with_name(store_dir.name + ".partial")
    with ExitStack() as stack, disk_full_explained(partial, "pack"):
        source = WeightSource(checkpoint, stack)
        formats = {EXACT_VARIANT: weight_format} | {name: name for name in variants}
        encoders = {
            variant: FORMATS[name](architecture, source, report)
            for variant, name in formats.items()
        }
        writer = RecordWriter(architecture, encoders, source)
        needed = writer.total_bytes + sum(one.length_bytes for one in architecture.dense)
        remedy = ", or use `flashmoe index`, which copies nothing"
        check_space(needed, partial, store_dir, "packing", remedy)
        for remark in remarks(architecture):
            warn(remark)
        partial.mkdir(parents=True, exist_ok=True)
        manifest = _write_store(writer, checkpoint, partial, report)
        manifest.write(partial)
        (partial / JOURNAL_NAME).unlink()
        publish(partial, store_dir)
    return manifest


def _write_store(
    writer: RecordWriter, checkpoint: Checkpoint, partial: Path, report: Report
) -> Manifest:
    architecture, variants = writer.architecture, writer.variants
    task: dict[str, object] = {
        "files": [file.row() for file in checkpoint.files],
        "weight_format": str(variants[EXACT_VARIANT].weight_format),
    }
    if len(variants) > 1:
        task["variants"] = {name: str(each.weight_format) for name, each in variants.items()}
    with record_file(partial, task, writer.total_bytes, report) as file:
        records = writer.write(file)
    dense = write_dense(
        partial,
        architecture.dense,
        lambda one: writer.source.chunks([Part(one, one.offset_bytes, one.length_bytes)]),
    )
    manifest = Manifest(
        format="packed",
        spec=make_spec(architecture, dense, variants),
        sizing=measure(architecture),
        source_root=".",
        files=written_files(partial),
        records=records,
    ).sealed()
    copy_side_files(checkpoint.root, partial, _card(writer, checkpoint, manifest))
    return manifest


def _card(writer: RecordWriter, checkpoint: Checkpoint, manifest: Manifest) -> Card | None:
    """None where experts are the checkpoint's own bytes."""
    weight_format = manifest.spec.weight_format
    if weight_format == EXACT:
        return None
    dense_bytes = sum(tensor.length_bytes for tensor in writer.architecture.dense)
    return Card(
        name=checkpoint.root.name,
        model_type=manifest.spec.model_type,
        weight_format=weight_format,
        contents=writer.encoders[EXACT_VARIANT].contents,
        source_bytes=checkpoint.weight_bytes - dense_bytes,
        packed_bytes=manifest.expert_bytes_total,
    )
