"""A store with a quality card, as `flashmoe tune` would leave it."""

from __future__ import annotations

import shutil
from pathlib import Path

from deploy.stack.stack_plan import load_store
from proto.quality import QUALITY_NAME, QualityCard
from tests.proto.test_quality import EXACT, setting

ROUTE = "skip 1"


def tuned_copy(store: Path, copy: Path) -> Path:
    """A copy whose card lies beside its manifest; a budget of 50 % buys ROUTE."""
    shutil.copytree(store, copy)
    QualityCard(
        fingerprint=load_store(copy).spec.fingerprint,
        experts_bytes=1,
        texts="planted",
        num_texts=1,
        num_tokens=1,
        settings=(EXACT, setting(ROUTE, 1.01, 0.01, 20.0)),
    ).write(copy / QUALITY_NAME)
    return copy
