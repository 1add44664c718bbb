"""RecordKey -> where its bytes lie on disk and in a slot; immutable once loaded."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expert_store.manifest.checks import check
from expert_store.manifest.document import decode, encode, fingerprint
from expert_store.manifest.durable import sync_folder, write_all
from expert_store.manifest.extents import ExpertRecord
from expert_store.manifest.share import Share
from expert_store.manifest.size_classes import SizeClasses
from expert_store.manifest.sizing import Sizing
from expert_store.manifest.sources import SourceFile, resolve_inside
from proto import errors
from proto.expert import EXACT_VARIANT, ModelSpec, RecordKey
from proto.held_experts import ALL_EXPERTS, HeldExperts

MANIFEST_NAME = "manifest.json"
IN_PLACE = "in-place"


@dataclass(frozen=True)
class Manifest:
    """Of one store: everything the daemon needs, and nothing it has to interpret.

    share: the part of the model's experts that the store has; None: all of them
    """

    format: str
    spec: ModelSpec
    sizing: Sizing
    source_root: str
    files: tuple[SourceFile, ...]
    records: dict[RecordKey, ExpertRecord]
    share: Share | None = None

    @property
    def size_classes(self) -> SizeClasses:
        return SizeClasses.of(self.records.values())

    @property
    def slot_bytes(self) -> int:
        """Of the largest exact record; no other variant's is larger."""
        return self.size_classes.slot_bytes

    def record(self, key: RecordKey) -> ExpertRecord:
        """Raises UnknownExpert, and ExpertElsewhere where this store has only a share."""
        record = self.records.get(key)
        if record is not None:
            return record
        if self.share is not None and self.spec.contains(key.expert):
            raise errors.ExpertElsewhere(
                f"this store is {self.share} and has no expert {key}: ask a store that has it"
            )
        raise errors.UnknownExpert(f"this model has no expert {key}")

    @property
    def num_experts(self) -> int:
        """That the store has."""
        return self.held.num(self.spec)

    @property
    def held(self) -> HeldExperts:
        """Which experts the store has."""
        if self.share is None:
            return ALL_EXPERTS
        return HeldExperts(frozenset(key.expert for key in self.records))

    @property
    def expert_bytes_total(self) -> int:
        """Of all variants."""
        return sum(record.payload_bytes for record in self.records.values())

    @property
    def exact_records(self) -> list[ExpertRecord]:
        """What a model computes with when nothing else is asked for."""
        return [one for one in self.records.values() if one.key.variant == EXACT_VARIANT]

    def root(self, store_dir: Path, override: Path | None = None) -> Path:
        """Where the source files are: `override`, else what was recorded, relative to the store."""
        return Path(os.path.realpath(override or store_dir / self.source_root))

    def sealed(self) -> Manifest:
        """This manifest with the fingerprint its content has."""
        digest = fingerprint(self.format, self.spec, self.records)
        return replace(self, spec=replace(self.spec, fingerprint=digest))

    def write(self, store_dir: Path) -> None:
        """Publish atomically: write, fsync, rename, fsync the folder.

        Raises ManifestInvalid when the folder cannot be written.
        """
        target = store_dir / MANIFEST_NAME
        partial = target.with_suffix(".partial")
        data = json.dumps(encode(**vars(self)), separators=(",", ":")).encode()
        try:
            store_dir.mkdir(parents=True, exist_ok=True)
            with partial.open("wb", buffering=0) as file:
                write_all(file.fileno(), data, 0)
                os.fsync(file.fileno())
            partial.replace(target)
            sync_folder(store_dir)
        except OSError as error:
            raise errors.ManifestInvalid(f"cannot write {target}: {error.strerror}") from error

    @classmethod
    def load(cls, store_dir: Path) -> Manifest:
        """Raises ManifestInvalid naming the file and what does not add up."""
        path = store_dir / MANIFEST_NAME
        try:
            document = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            if not store_dir.exists():
                raise errors.ManifestInvalid(
                    f"{store_dir} does not exist: give a folder that `flashmoe index` or `pack` "
                    "made"
                ) from error
            raise errors.ManifestInvalid(
                f"{store_dir} is not a store (no {MANIFEST_NAME}): make one with `flashmoe index`"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise errors.ManifestInvalid(f"{path} cannot be read: {error}") from error
        return cls.parse(document, str(path))

    @classmethod
    def parse(cls, document: Any, name: str) -> Manifest:
        """Raises ManifestInvalid."""
        try:
            manifest = cls(**decode(document))
            check(manifest.spec, manifest.files, manifest.records, manifest.share)
        except (
            KeyError,
            TypeError,
            ValueError,
            IndexError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise errors.ManifestInvalid(f"{name} is damaged ({error!r}): index again") from error
        except errors.ManifestInvalid as error:
            raise errors.ManifestInvalid(f"{name}: {error}") from error
        return manifest


def check_sources(manifest: Manifest, root: Path, *, times: bool = True) -> None:
    """Compare the files on disk with what was indexed: size always, time if `times`.

    Time counts in place only. A checkpoint is its owner's: saved anew it has the same sizes, and
    nothing may be served from it that was indexed before. A packed store's files are written once,
    by us, and each of their bytes is checked against the manifest before it is used, so a copy of
    it is as good.
    Raises SourceChanged naming the file.
    """
    times = times and manifest.format == IN_PLACE
    for source in manifest.files:
        path = resolve_inside(root, source.path)
        try:
            stat = path.stat()
        except FileNotFoundError as error:
            raise errors.SourceChanged(
                f"{path} is missing: restore it, or name its folder with --source"
            ) from error
        except OSError as error:
            raise errors.SourceChanged(
                f"{path} cannot be read ({error.strerror}): let the user who serves it read it"
            ) from error
        if stat.st_size != source.size_bytes:
            raise errors.SourceChanged(
                f"{path} has {stat.st_size} bytes, {source.size_bytes} when indexed: index again"
            )
        if times and stat.st_mtime_ns != source.mtime_ns:
            raise errors.SourceChanged(
                f"{path} was touched after it was indexed: run `flashmoe verify` on the store"
            )
