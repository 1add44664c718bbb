"""What a stack's memory holds, as its launcher writes it beside the sockets and others read it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from proto.stats import Labelled, gauge, labelled

FILE_NAME = "memory.json"


@dataclass(frozen=True)
class Part:
    size_bytes: int = gauge("flashmoe_memory_bytes", "Held now, by part", key="memory_part_bytes")


@dataclass
class MemoryReport:
    """parts:   held by each now
    by_part: of the sample with the highest sum
    written_at_s: since the epoch; written anew every half second while the launcher can
    """

    ceiling_bytes: int = gauge(
        "flashmoe_memory_ceiling_bytes", "What the stack may hold", key="memory_ceiling", start=0
    )
    peak_bytes: int = gauge(
        "flashmoe_memory_peak_bytes", "Held at most since the start", key="memory_peak", start=0
    )
    current_bytes: int = 0
    by_part: dict[str, int] = field(default_factory=dict)
    cgroup_peak_bytes: int | None = None
    write_failures: int = 0
    written_at_s: float = 0.0
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def age_s(self) -> float:
        return max(0.0, time.time() - self.written_at_s)

    @classmethod
    def read(cls, run_dir: Path) -> MemoryReport | None:
        """None when no stack of ours runs there, or one of another release."""
        try:
            return cls(**json.loads((run_dir / FILE_NAME).read_text()))
        except (OSError, TypeError, ValueError):
            return None

    def sources(self) -> Iterator[object]:
        """What `proto.stats.snapshot` takes."""
        yield self
        yield from self._parts()

    def _parts(self) -> Iterator[Labelled]:
        return (labelled(Part(size_bytes), part=name) for name, size_bytes in self.parts.items())
