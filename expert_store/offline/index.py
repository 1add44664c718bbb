"""A checkpoint read in place: a manifest over it, no copy. Offline; imports transformers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import xxhash

from expert_store.manifest.extents import ExpertRecord, Extent, slot_bytes_needed
from expert_store.manifest.manifest import IN_PLACE, MANIFEST_NAME, Manifest
from expert_store.manifest.sizing import Sizing
from expert_store.manifest.sources import SourceFile, resolve_inside
from expert_store.offline.checkpoint.architecture import Architecture, remarks
from expert_store.offline.checkpoint.files import Checkpoint, CheckpointTensor, read_chunks
from expert_store.offline.checkpoint.opened import open_checkpoint
from expert_store.offline.checkpoint.parameters import ExpertParameter, Part
from expert_store.offline.checkpoint.progress import Journal, Report, Warn, silent, unheard
from expert_store.offline.formats.encoder import describe_variant
from expert_store.offline.formats.exact import ExactEncoder, check_plain
from proto import errors
from proto.checkpoint.trained_context import trained_context_tokens
from proto.expert import (
    EXACT_VARIANT,
    DenseTensor,
    ExpertKey,
    ModelSpec,
    RecordKey,
    Variant,
)
from proto.shm import PAGE_BYTES, TENSOR_ALIGN_BYTES, align_up

_FLUSH_BYTES = 256 * 1024 * 1024


@dataclass
class _Tail:
    """The extent being built, and how far its file range reaches."""

    file: int
    offset_bytes: int
    length_bytes: int
    place_bytes: int

    def continues(self, part: Part, place_bytes: int | None) -> bool:
        """Whether `part` can be read as one with this extent and end up at `place_bytes` (None:
        anywhere aligned).
        """
        adjacent = (part.tensor.file, part.offset_bytes) == (
            self.file,
            self.offset_bytes + self.length_bytes,
        )
        natural = self.place_bytes + self.length_bytes
        if place_bytes is None:
            return adjacent and natural % TENSOR_ALIGN_BYTES == 0
        return adjacent and natural == place_bytes


def lay_out(tensors: Sequence[Sequence[Part]]) -> tuple[tuple[Extent, ...], tuple[int, ...]]:
    """Extents and tensor offsets for one expert, its tensors in any order.

    Tensors follow their order on disk, so that neighbours become one read that needs no move
    afterwards.
    """
    extents: list[_Tail] = []
    offsets = [0] * len(tensors)
    landing = 0  # of the next read
    for number in sorted(
        range(len(tensors)), key=lambda n: (tensors[n][0].tensor.file, tensors[n][0].offset_bytes)
    ):
        place: int | None = None
        for part in tensors[number]:
            if extents and extents[-1].continues(part, place):
                start = extents[-1].place_bytes + extents[-1].length_bytes
                extents[-1].length_bytes += part.length_bytes
            else:
                landing = _landing_after(extents)
                arrived = landing + part.offset_bytes % PAGE_BYTES
                start = (
                    arrived // TENSOR_ALIGN_BYTES * TENSOR_ALIGN_BYTES if place is None else place
                )
                extents.append(_Tail(part.tensor.file, part.offset_bytes, part.length_bytes, start))
            if place is None:
                offsets[number] = start
            place = start + part.length_bytes
    return tuple(
        Extent(e.file, e.offset_bytes, e.length_bytes, e.place_bytes) for e in extents
    ), tuple(offsets)


def _landing_after(extents: Sequence[_Tail]) -> int:
    return sum(align_up(e.offset_bytes % PAGE_BYTES + e.length_bytes) for e in extents)


def expert_parts(layer: Sequence[ExpertParameter], expert: int) -> list[tuple[Part, ...]]:
    return [parameter.parts[expert] for parameter in layer]


def index(root: Path, store_dir: Path, report: Report = silent, warn: Warn = unheard) -> Manifest:
    """Write a manifest over the checkpoint in `root` to `store_dir`; reads every byte once for
    the checksums. `warn` hears what the user should know of the model, before the reading.

    Killed and started again, it goes on where it was.
    Raises CheckpointUnsupported, ManifestInvalid (a shard missing or damaged, the disk full).
    """
    root, store_dir = root.resolve(), Path(os.path.realpath(store_dir))
    _check_not_packed(store_dir)
    checkpoint, architecture = open_checkpoint(root, warn)
    check_plain(architecture, f"run `flashmoe pack {root} --out STORE --format bf16` (or int4)")
    for file in checkpoint.files:
        resolve_inside(root, file.path)  # the daemon would refuse it, after all the reading
    _make_folder(store_dir)
    for remark in remarks(architecture):
        warn(remark)
    with ExitStack() as stack:
        journal = _open_journal(store_dir / "index.journal", checkpoint, stack)
        hasher = _Hasher(checkpoint, journal, report, architecture, stack)
        records = {RecordKey(key): _record(key, architecture, hasher) for key in architecture.keys}
        dense = tuple(
            describe_dense(tensor, checkpoint.files, hasher.dense(tensor))
            for tensor in architecture.dense
        )
        manifest = Manifest(
            format=IN_PLACE,
            spec=make_spec(
                architecture, dense, {EXACT_VARIANT: describe_variant(architecture, ExactEncoder())}
            ),
            sizing=measure(architecture),
            source_root=os.path.relpath(root, store_dir),
            files=checkpoint.files,
            records=records,
        ).sealed()
        manifest.write(store_dir)
    (store_dir / "index.journal").unlink()
    return manifest


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.ManifestInvalid(
            f"cannot write {path} ({error.strerror}): give another --out"
        ) from error


def _check_not_packed(store_dir: Path) -> None:
    """Raises ManifestInvalid where another manifest would make a packed store worthless."""
    try:
        found = Manifest.load(store_dir)
    except errors.ManifestInvalid:
        return  # none, or one that is of no use
    if found.format != IN_PLACE:
        raise errors.ManifestInvalid(f"{store_dir} holds a packed store: give another --out")


def is_indexed(root: Path, store_dir: Path) -> bool:
    """Whether `store_dir` holds an up-to-date in-place manifest of the checkpoint in `root`.

    Files of another time count as changed: that costs reading them, the other way a wrong store.
    """
    if not (store_dir / MANIFEST_NAME).exists():
        return False
    try:
        manifest = Manifest.load(store_dir)
    except errors.ManifestInvalid:
        return False  # damaged, or of an older version: index anew
    same_root = manifest.root(store_dir) == root.resolve()
    return same_root and manifest.files == Checkpoint.open(root.resolve()).files


def make_spec(
    architecture: Architecture,
    dense: tuple[DenseTensor, ...],
    variants: dict[str, Variant],
) -> ModelSpec:
    """variants: the exact one among them"""
    others = dict(variants)
    exact = others.pop(EXACT_VARIANT)
    return ModelSpec(
        fingerprint="",
        model_type=architecture.model_type,
        moe_layers=tuple(architecture.layers),
        num_experts=architecture.num_experts,
        top_k=architecture.top_k,
        layouts=exact.layouts,
        dense=dense,
        weight_format=exact.weight_format,
        variants=others,
    )


def measure(architecture: Architecture) -> Sizing:
    """What the planner needs."""
    config = architecture.model.config.get_text_config()
    dense_bytes = sum(tensor.length_bytes for tensor in architecture.dense)
    embedding = architecture.model.get_input_embeddings().weight
    tied = bool(getattr(config, "tie_word_embeddings", False))
    eager = architecture.model.config._attn_implementation == "eager"
    looked_up = 0 if tied else embedding.numel() * embedding.element_size()
    return Sizing(
        dense_bytes=dense_bytes,
        cache_bytes_per_token=architecture.dry_run.cache_bytes_per_token,
        cache_bytes_fixed=architecture.dry_run.cache_bytes_fixed,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=trained_context_tokens(config) or 0,
        activated_dense_bytes=dense_bytes - looked_up,
        eager_attention_heads=config.num_attention_heads if eager else 0,
    )


def describe_dense(
    tensor: CheckpointTensor, files: tuple[SourceFile, ...], checksum: int
) -> DenseTensor:
    return DenseTensor(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        file=files[tensor.file].path,
        offset_bytes=tensor.offset_bytes,
        length_bytes=tensor.length_bytes,
        checksum=checksum,
    )


def _record(key: ExpertKey, architecture: Architecture, hasher: _Hasher) -> ExpertRecord:
    extents, offsets = lay_out(expert_parts(architecture.layers[key.layer], key.expert))
    assert slot_bytes_needed(extents) % PAGE_BYTES == 0
    return ExpertRecord(RecordKey(key), extents, offsets, hasher.expert(key, extents))


def _open_journal(path: Path, checkpoint: Checkpoint, stack: ExitStack) -> Journal:
    journal = Journal(path, {"files": [file.row() for file in checkpoint.files]})
    stack.callback(journal.close)
    return journal


class _Hasher:
    """Reads ranges once for their checksums, skipping what the journal already has."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        journal: Journal,
        report: Report,
        architecture: Architecture,
        stack: ExitStack,
    ) -> None:
        self._journal = journal
        self._report = report
        self._done_bytes = 0
        self._unflushed_bytes = 0
        self._total_bytes = sum(t.length_bytes for t in checkpoint.tensors.values())
        self._descriptors = checkpoint.descriptors(stack)

    def expert(self, key: ExpertKey, extents: Sequence[Extent]) -> int:
        return self._hash(str(key), [(e.file, e.offset_bytes, e.length_bytes) for e in extents])

    def dense(self, tensor: CheckpointTensor) -> int:
        return self._hash(tensor.name, [(tensor.file, tensor.offset_bytes, tensor.length_bytes)])

    def _hash(self, name: str, ranges: list[tuple[int, int, int]]) -> int:
        length_bytes = sum(length for _, _, length in ranges)
        self._done_bytes += length_bytes
        if name not in self._journal.done:
            self._journal.add(name, self._read(name, ranges))
            self._unflushed_bytes += length_bytes
            if self._unflushed_bytes > _FLUSH_BYTES:
                self._journal.flush()
                self._unflushed_bytes = 0
        self._report(self._done_bytes, self._total_bytes)
        return self._journal.done[name]

    def _read(self, name: str, ranges: list[tuple[int, int, int]]) -> int:
        digest = xxhash.xxh3_64()
        try:
            for file, offset_bytes, length_bytes in ranges:
                for chunk in read_chunks(self._descriptors[file], offset_bytes, length_bytes):
                    digest.update(chunk)
        except (OSError, EOFError) as error:
            raise errors.ManifestInvalid(f"{name} cannot be read: {error}") from error
        return digest.intdigest()
