"""Records that were found damaged: not read again before the store starts anew."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from proto import errors
from proto.expert import RecordKey
from proto.stats import fact, gauge

logger = logging.getLogger(__name__)


class Quarantine:
    """Keeps what was said of each damaged record, for every session that asks for it."""

    def __init__(self) -> None:
        self._reasons: dict[RecordKey, str] = {}

    def __contains__(self, key: RecordKey) -> bool:
        return key in self._reasons

    def __iter__(self) -> Iterator[RecordKey]:
        return iter(self._reasons)

    def __len__(self) -> int:
        return len(self._reasons)

    @property
    @gauge("flashmoe_store_quarantined_experts", "Damaged experts", key="quarantined_experts")
    def count(self) -> int:
        return len(self._reasons)

    @property
    @fact("Damaged experts, by name", key="quarantined")
    def names(self) -> list[str]:
        return [str(key) for key in self._reasons]

    def add(self, key: RecordKey, error: errors.ExpertDamaged) -> None:
        self._reasons[key] = str(error)
        logger.error("expert quarantined", extra={"key": str(key), "reason": str(error)})

    def error(self, key: RecordKey) -> errors.ExpertDamaged:
        return errors.ExpertDamaged(self._reasons[key])
