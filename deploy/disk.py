"""How fast this disk gives experts: a measured sample of a store's own records."""

from __future__ import annotations

import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from expert_store import huge_pages
from expert_store.extents import ExpertRecord
from expert_store.manifest import Manifest
from expert_store.reader import open_files, read_record

_SAMPLES = 48
_BUDGET_S = 3.0


@dataclass(frozen=True)
class DiskSpeed:
    """Of single records, verification included, at the store's read depth. Seconds are per
    record and reader.
    """

    record_bytes: int
    read_depth: int
    p10_s: float
    median_s: float
    p90_s: float
    records_per_s: float
    direct_io: bool

    @property
    def bytes_per_s(self) -> float:
        return self.records_per_s * self.record_bytes


def measure_disk(manifest: Manifest, root: Path, read_depth: int = 4) -> DiskSpeed:
    """Read random records of the store, directly, for at most a few seconds.

    Raises ManifestInvalid, ExpertDamaged.
    """
    records = list(manifest.records.values())
    chosen = random.Random(0).sample(records, min(_SAMPLES, len(records)))
    times: list[float] = []
    with open_files(manifest, root, direct_io=True) as files:
        start_s = time.perf_counter()

        def read(share: list[ExpertRecord]) -> None:
            with huge_pages.buffer(manifest.slot_bytes) as view:
                for record in share:
                    if time.perf_counter() - start_s > _BUDGET_S:
                        return
                    begin_s = time.perf_counter()
                    read_record(files, record, view)
                    times.append(time.perf_counter() - begin_s)

        with ThreadPoolExecutor(read_depth) as pool:
            list(pool.map(read, [chosen[n::read_depth] for n in range(read_depth)]))
        wall_s = time.perf_counter() - start_s
        direct = files.direct
    deciles = statistics.quantiles(times, n=10) if len(times) > 1 else times * 9
    return DiskSpeed(
        record_bytes=statistics.fmean(r.payload_bytes for r in chosen).__ceil__(),
        read_depth=read_depth,
        p10_s=deciles[0],
        median_s=statistics.median(times),
        p90_s=deciles[8],
        records_per_s=len(times) / wall_s,
        direct_io=direct,
    )
