"""Which experts were in memory, written down now and then, so that a store that starts again fills
its slots with them while nobody waits. Their bytes are read and verified anew.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from expert_store.store.store import ExpertStore
from proto.expert import EXACT_VARIANT, ExpertKey, RecordKey

logger = logging.getLogger(__name__)

_INTERVAL_S = 5.0


@asynccontextmanager
async def kept(store: ExpertStore, path: Path | None) -> AsyncIterator[None]:
    """Refill from the list at `path`, and keep it up to date for the block. None: neither."""
    if path is None:
        yield
        return
    store.refill(load(path, store.manifest.spec.fingerprint))
    keeper = Keeper(store, path)
    saving = asyncio.create_task(keeper.save_now_and_then())
    try:
        yield
    finally:
        saving.cancel()
        await asyncio.gather(saving, return_exceptions=True)
        keeper.save_current()


def load(path: Path, fingerprint: str) -> list[RecordKey]:
    """Most wanted first. Empty, with a warning, for a list of another model or none at all."""
    try:
        found = json.loads(path.read_text())
        if found["fingerprint"] == fingerprint:
            return [_key(*row) for row in found["experts"]]
        reason = "it is of another model"
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = repr(error)
    logger.warning("list of residents not used", extra={"path": str(path), "reason": reason})
    return []


def save(path: Path, fingerprint: str, experts: Sequence[RecordKey]) -> None:
    """Raises OSError."""
    text = json.dumps({"fingerprint": fingerprint, "experts": [_row(key) for key in experts]})
    scratch = path.with_suffix(".new")
    try:
        scratch.write_text(text)
        os.replace(scratch, path)
    except OSError:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


def _row(key: RecordKey) -> list[int | str]:
    row: list[int | str] = [key.expert.layer, key.expert.expert]
    return row if key.variant == EXACT_VARIANT else [*row, key.variant]


def _key(layer: int, expert: int, variant: str = EXACT_VARIANT) -> RecordKey:
    return RecordKey(ExpertKey(int(layer), int(expert)), str(variant))


class Keeper:
    """Writes the list of one store down. num_failures: since it was written last."""

    def __init__(self, store: ExpertStore, path: Path) -> None:
        self._store = store
        self._path = path
        self.num_failures = 0

    async def save_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            await asyncio.to_thread(self.save_current)

    def save_current(self) -> None:
        """Log once that a disk refuses, and the number of failures when it accepts again."""
        experts = self._store.wanted()
        if not experts:
            return  # a store that has not filled yet knows less than its list
        try:
            save(self._path, self._store.manifest.spec.fingerprint, experts)
        except OSError as error:
            self.num_failures += 1
            if self.num_failures == 1:
                logger.warning("list of residents not written", extra={"reason": str(error)})
            return
        if self.num_failures:
            logger.info("list of residents written again", extra={"failures": self.num_failures})
            self.num_failures = 0
