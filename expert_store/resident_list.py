"""Which experts were in memory, written down now and then, so that a store that starts again fills
its slots with them while nobody waits. Their bytes are read and verified anew.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from expert_store.store import ExpertStore
from proto.expert import ExpertKey

logger = logging.getLogger(__name__)

_INTERVAL_S = 5.0


@asynccontextmanager
async def kept(store: ExpertStore, path: Path | None) -> AsyncIterator[None]:
    """Refill from the list at `path`, and keep it up to date for the block. None: neither."""
    if path is None:
        yield
        return
    store.refill(load(path, store.manifest.spec.fingerprint))
    saving = asyncio.create_task(_save_now_and_then(store, path))
    try:
        yield
    finally:
        saving.cancel()
        await asyncio.gather(saving, return_exceptions=True)
        _save_current(store, path)


def load(path: Path, fingerprint: str) -> list[ExpertKey]:
    """Most wanted first. Empty, with a warning, for a list of another model or none at all."""
    try:
        found = json.loads(path.read_text())
        if found["fingerprint"] == fingerprint:
            return [ExpertKey(int(layer), int(expert)) for layer, expert in found["experts"]]
        reason = "it is of another model"
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = repr(error)
    logger.warning("list of residents not used", extra={"path": str(path), "reason": reason})
    return []


def save(path: Path, fingerprint: str, experts: Sequence[ExpertKey]) -> None:
    """Raises OSError."""
    text = json.dumps(
        {"fingerprint": fingerprint, "experts": [[key.layer, key.expert] for key in experts]}
    )
    scratch = path.with_suffix(".new")
    scratch.write_text(text)
    os.replace(scratch, path)


async def _save_now_and_then(store: ExpertStore, path: Path) -> None:
    while True:
        await asyncio.sleep(_INTERVAL_S)
        await asyncio.to_thread(_save_current, store, path)


def _save_current(store: ExpertStore, path: Path) -> None:
    experts = store.wanted()
    if not experts:
        return  # a store that has not filled yet knows less than its list
    try:
        save(path, store.manifest.spec.fingerprint, experts)
    except OSError as error:
        logger.warning("list of residents not written", extra={"reason": str(error)})
