"""A checkpoint -> a self-contained store: aligned records, dense weights, config, tokenizer.
Offline, resumable.

Everything is written beside the target and moved there at the end, so the target is whole or as
it was.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import xxhash

from expert_store.manifest.manifest import Manifest
from expert_store.manifest.sources import SourceFile
from expert_store.offline.card import Card
from expert_store.offline.checkpoint.architecture import remarks
from expert_store.offline.checkpoint.files import Checkpoint, read_header
from expert_store.offline.checkpoint.opened import open_checkpoint
from expert_store.offline.checkpoint.progress import Journal, Report, Warn, silent, unheard
from expert_store.offline.companions import DENSE_NAME, copy_side_files, write_dense
from expert_store.offline.formats.table import FORMATS
from expert_store.offline.formats.weight_source import WeightSource
from expert_store.offline.index import make_spec, measure
from expert_store.offline.pack_target import check_target, publish
from expert_store.offline.records import RECORDS_NAME, RecordWriter
from proto import errors
from proto.expert import EXACT_VARIANT
from proto.weight_format import EXACT

JOURNAL_NAME = "pack.journal"


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
    with ExitStack() as stack, _disk_full_explained(partial):
        source = WeightSource(checkpoint, stack)
        formats = {EXACT_VARIANT: weight_format} | {name: name for name in variants}
        encoders = {
            variant: FORMATS[name](architecture, source, report)
            for variant, name in formats.items()
        }
        writer = RecordWriter(architecture, encoders, source)
        _check_space(writer, partial, store_dir)
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
    if not (partial / RECORDS_NAME).exists():  # the journal would promise what is gone
        (partial / JOURNAL_NAME).unlink(missing_ok=True)
    with closing(Journal(partial / JOURNAL_NAME, task)) as journal:
        records = writer.write(partial / RECORDS_NAME, journal, report)
    dense = write_dense(partial, architecture.dense, writer.source)
    manifest = Manifest(
        format="packed",
        spec=make_spec(architecture, dense, variants),
        sizing=measure(architecture),
        source_root=".",
        files=(_source_file(partial, RECORDS_NAME), _source_file(partial, DENSE_NAME)),
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


def _source_file(folder: Path, name: str) -> SourceFile:
    stat = (folder / name).stat()
    digest = ""
    if name == DENSE_NAME:
        digest = xxhash.xxh3_128_hexdigest(read_header(folder / name)[1])
    return SourceFile(name, stat.st_size, stat.st_mtime_ns, digest)


def _check_space(writer: RecordWriter, partial: Path, store_dir: Path) -> None:
    needed = writer.total_bytes
    needed += sum(tensor.length_bytes for tensor in writer.architecture.dense)
    written = sum(f.stat().st_blocks * 512 for f in partial.iterdir()) if partial.exists() else 0
    store_dir.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(store_dir.parent).free + written
    if free < needed:
        raise errors.ManifestInvalid(
            f"packing needs {needed:,} bytes, {store_dir.parent} has {free:,} free: "
            "free some, or use `flashmoe index`, which copies nothing"
        )


@contextmanager
def _disk_full_explained(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise errors.ManifestInvalid(f"cannot pack: {error}") from error
        raise errors.ManifestInvalid(
            f"the disk is full: free some space and run the same command, it resumes from {partial}"
        ) from error
