"""The learner's state on disk: an npz without pickle, closed by its SHA-256, replaced whole."""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import os
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from proto import errors
from proto.stats import counter
from scheduler.learn.learner import ModelState, ReuseModel

logger = logging.getLogger(__name__)

FORMAT = 1
MAX_BYTES = 1 << 20
_DIGEST_BYTES = hashlib.sha256().digest_size


class SnapshotInvalid(errors.FlashMoEError):
    """A snapshot is damaged, of another format, or of another model or set of features."""

    status = grpc.StatusCode.FAILED_PRECONDITION


def save(path: Path, fingerprint: str, state: ModelState) -> None:
    """Replace the snapshot: after a crash the old one or the new one is there. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(encode(fingerprint, state))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def load(path: Path, fingerprint: str, names: tuple[str, ...]) -> ModelState:
    """Raises SnapshotInvalid, saying what is wrong; FileNotFoundError, OSError."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    return decode(data, fingerprint, names)


def set_aside(path: Path) -> Path:
    """Rename a snapshot that cannot be used, so that a person may look at it."""
    aside = path.with_name(path.name + ".damaged")
    path.replace(aside)
    return aside


def encode(fingerprint: str, state: ModelState) -> bytes:
    body = io.BytesIO()
    arrays: dict[str, Any] = {field.name: getattr(state, field.name) for field in fields(state)}
    np.savez(body, format=FORMAT, fingerprint=fingerprint, **arrays)
    return body.getvalue() + hashlib.sha256(body.getvalue()).digest()


def decode(data: bytes, fingerprint: str, names: tuple[str, ...]) -> ModelState:
    """Raises SnapshotInvalid, saying what is wrong."""
    arrays = _arrays(data)
    if arrays["fingerprint"] != fingerprint:
        raise SnapshotInvalid(f"the snapshot is of the model {arrays['fingerprint']}")
    if tuple(arrays["names"].tolist()) != names:
        raise SnapshotInvalid("the snapshot has other features: half_lives_tokens was changed")
    return _state(arrays, names)


def _arrays(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise SnapshotInvalid(f"the snapshot has more than {MAX_BYTES} bytes")
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise SnapshotInvalid("the snapshot does not match its checksum")
    with np.load(io.BytesIO(body), allow_pickle=False) as archive:
        arrays = dict(archive)
    if arrays.get("format") != FORMAT:
        raise SnapshotInvalid(f"the snapshot has another format than {FORMAT}")
    return arrays


def _state(arrays: dict[str, Any], names: tuple[str, ...]) -> ModelState:
    vectors = ("weights", "means", "variances", "counts")
    scalars = [f.name for f in fields(ModelState) if f.name not in ("names", *vectors)]
    for name in (*vectors, *scalars):
        shape = (len(names),) if name in vectors else ()
        if arrays[name].shape != shape:
            raise SnapshotInvalid(f"the snapshot's {name} has the shape {arrays[name].shape}")
        if not np.isfinite(arrays[name]).all():
            raise SnapshotInvalid(f"the snapshot's {name} is not finite")
    return ModelState(
        names=names,
        **{name: arrays[name] for name in vectors},
        **{name: arrays[name].item() for name in scalars},
    )


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class SnapshotFile:
    """Keeps a model's state at one path, or nowhere when there is none."""

    saved: int = counter("flashmoe_scheduler_snapshots", "snapshots", key="snapshots")
    failed: int = counter(
        "flashmoe_scheduler_snapshots_failed", "snapshots failed", key="snapshots_failed"
    )
    damaged: int = counter(
        "flashmoe_scheduler_snapshots_damaged", "snapshots damaged", key="snapshots_damaged"
    )

    def __init__(self, path: Path | None, fingerprint: str, interval_s: float) -> None:
        self._path = path
        self._fingerprint = fingerprint
        self._interval_s = interval_s
        self._due_s: float | None = None
        self._saved_labels = -1
        self._is_failing = False

    def restore(self, model: ReuseModel) -> None:
        """Bring the model to where it was; a snapshot that cannot be used is set aside."""
        if self._path is None or not self._path.exists():
            return
        try:
            model.restore(load(self._path, self._fingerprint, model.names))
        except SnapshotInvalid as error:
            self.damaged += 1
            aside = set_aside(self._path)
            logger.warning("snapshot set aside", extra={"reason": str(error), "path": str(aside)})
            return
        logger.info("snapshot restored", extra={"labels_learned": model.labels_learned})

    def is_due(self, now_s: float) -> bool:
        """Whether an interval has passed since the last call that said so, or since the first."""
        if self._due_s is None:
            self._due_s = now_s + self._interval_s
        if now_s < self._due_s:
            return False
        self._due_s = now_s + self._interval_s
        return True

    async def save(self, model: ReuseModel) -> None:
        """Write what is new since the last time; a disk that refuses is counted, not raised."""
        if self._path is None or model.labels_learned == self._saved_labels:
            return
        state = model.state()
        try:
            await asyncio.to_thread(save, self._path, self._fingerprint, state)
        except OSError as error:
            self.failed += 1
            if not self._is_failing:
                logger.warning("snapshot not saved", extra={"reason": str(error)})
            self._is_failing = True
            return
        self._is_failing = False
        self._saved_labels = state.labels_learned
        self.saved += 1
