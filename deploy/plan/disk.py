"""How fast a disk reads as the store reads: several pieces at once, directly, into huge pages."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.terminal import console
from expert_store.io import huge_pages
from expert_store.manifest.extents import ExpertRecord
from expert_store.manifest.manifest import Manifest
from expert_store.store.verified_read import open_files, read_record
from proto.shm import PAGE_BYTES

PIECE_BYTES = 2 * 1024 * 1024  # as the store reads by default
READ_DEPTH = 4
_PIECES = 48
_SAMPLES = 48
_BUDGET_S = 3.0


@dataclass(frozen=True)
class DiskSpeed:
    """Of whole pieces, nothing checked. obstacle: why reads are not direct; empty when they are."""

    bytes_per_s: float
    piece_bytes: int
    read_depth: int
    obstacle: str = ""

    def __str__(self) -> str:
        kind = "through the page cache" if self.obstacle else "direct"
        return (
            f"{self.bytes_per_s / 1e9:.2f} GB/s ({kind}, {console.size(self.piece_bytes)} a read, "
            f"{self.read_depth} at once)"
        )


@dataclass(frozen=True)
class RecordSpeed:
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


def measure_disk(files: Sequence[Path]) -> DiskSpeed:
    """Read random pieces of the files for at most a few seconds. Raises OSError."""
    sizes = {file: file.stat().st_size for file in files}
    piece_bytes = min(PIECE_BYTES, max(sizes.values()) // PAGE_BYTES * PAGE_BYTES or PAGE_BYTES)
    places = [
        (file, start)
        for file, size in sizes.items()
        for start in range(0, max(1, size - piece_bytes + 1), piece_bytes)
    ]
    chosen = random.Random(0).sample(places, min(_PIECES, len(places)))
    with _opened(files) as (descriptors, obstacle):
        start_s = time.perf_counter()

        def read(share: list[tuple[Path, int]]) -> int:
            with huge_pages.buffer(piece_bytes) as view:
                return sum(
                    os.preadv(descriptors[file], [view], start)
                    for file, start in share
                    if time.perf_counter() - start_s < _BUDGET_S
                )

        with ThreadPoolExecutor(READ_DEPTH) as pool:
            num_bytes = sum(pool.map(read, [chosen[n::READ_DEPTH] for n in range(READ_DEPTH)]))
        wall_s = time.perf_counter() - start_s
    return DiskSpeed(num_bytes / wall_s, piece_bytes, READ_DEPTH, obstacle)


@contextmanager
def _opened(files: Sequence[Path]) -> Iterator[tuple[dict[Path, int], str]]:
    """Descriptors by file, and why they are not direct. What the page cache has of files that
    cannot be read directly is dropped first.
    """
    with ExitStack() as stack:
        descriptors, obstacle = {}, ""
        for file in files:
            try:
                descriptors[file] = os.open(file, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                obstacle = os.strerror(error.errno or 0)
                descriptors[file] = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptors[file], 0, 0, os.POSIX_FADV_DONTNEED)
            stack.callback(os.close, descriptors[file])
        yield descriptors, obstacle


def measure_records(manifest: Manifest, root: Path, read_depth: int = READ_DEPTH) -> RecordSpeed:
    """Read random records of the store, directly, for at most a few seconds.

    Raises ManifestInvalid, ExpertDamaged.
    """
    records = manifest.exact_records
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
    return RecordSpeed(
        record_bytes=statistics.fmean(r.payload_bytes for r in chosen).__ceil__(),
        read_depth=read_depth,
        p10_s=deciles[0],
        median_s=statistics.median(times),
        p90_s=deciles[8],
        records_per_s=len(times) / wall_s,
        direct_io=direct,
    )
