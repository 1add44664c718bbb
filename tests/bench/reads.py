"""Record reads against a raw preadv of the same file, in one run; threads against aiofiles."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from mmap import mmap
from pathlib import Path

import aiofiles
import xxhash

from expert_store.extents import ExpertRecord, Extent, plan_reads
from expert_store.reader import SourceFiles, read_record
from proto.expert import ExpertKey
from tests.bench.table import percentile, show, spread

KIB, MIB = 1024, 1024 * 1024
SIZES = (256 * KIB, MIB, 3 * MIB, 12 * MIB)
FILE_BYTES = 1024 * MIB
READS_BYTES = 512 * MIB
DEPTH, ROUNDS = 4, 5

Times = list[float]
Read = Callable[[int, memoryview], None]


def main(folder: Path) -> None:
    path = folder / "records.bin"
    block = os.urandom(16 * MIB)
    with path.open("wb") as file:
        for _ in range(FILE_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    rows = [row for size in SIZES for row in measure(path, size)]
    show(
        f"Reads of random records, direct, depth {DEPTH}, {ROUNDS} rounds in turn: median "
        "(min-max)",
        ["record", "how", "GB/s", "of raw", "p50 ms", "p99 ms"],
        rows,
    )


def measure(path: Path, size: int) -> list[list[object]]:
    with ExitStack() as stack:
        files = SourceFiles([path], True, stack)
        checksums = _checksums(path, size)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        stack.callback(os.close, descriptor)

        def raw(number: int, view: memoryview) -> None:
            os.preadv(descriptor, [view[:size]], number * size)

        def unverified(number: int, view: memoryview) -> None:
            for read in plan_reads([Extent(0, number * size, size, 0)]):
                files.read(read, view)

        def verified(number: int, view: memoryview) -> None:
            extent = Extent(0, number * size, size, 0)
            record = ExpertRecord(ExpertKey(0, number), (extent,), (0,), checksums[number])
            read_record(files, record, view)

        ways: dict[str, Read] = {"raw preadv": raw, "store": unverified, "store+xxh3": verified}
        speeds: dict[str, Times] = {name: [] for name in [*ways, "aiofiles"]}
        latencies: dict[str, Times] = {name: [] for name in [*ways, "aiofiles"]}
        for round_number in range(ROUNDS):
            for name, read in ways.items():
                _threads(read, size, round_number, speeds[name], latencies[name])
            asyncio.run(
                _aiofiles(path, size, round_number, speeds["aiofiles"], latencies["aiofiles"])
            )
    label = f"{size // KIB} KiB" if size < MIB else f"{size // MIB} MiB"
    return [
        [
            label,
            name,
            spread([speed / 1e9 for speed in speeds[name]], 2),
            spread([a / b for a, b in zip(speeds[name], speeds["raw preadv"], strict=True)], 2),
            f"{percentile(latencies[name], 0.5) * 1e3:.2f}",
            f"{percentile(latencies[name], 0.99) * 1e3:.2f}",
        ]
        for name in speeds
    ]


def _numbers(size: int, seed: int) -> list[int]:
    count = READS_BYTES // size
    return random.Random(seed).sample(range(FILE_BYTES // size), count)


def _checksums(path: Path, size: int) -> list[int]:
    with path.open("rb") as file:
        found = [xxhash.xxh3_64_intdigest(file.read(size)) for _ in range(FILE_BYTES // size)]
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return found


def _threads(read: Read, size: int, seed: int, speeds: Times, latencies: Times) -> None:
    numbers = _numbers(size, seed)

    def work(share: list[int]) -> None:
        with mmap(-1, size) as buffer, memoryview(buffer) as view:
            for number in share:
                start_s = time.perf_counter()
                read(number, view)
                latencies.append(time.perf_counter() - start_s)

    start_s = time.perf_counter()
    with ThreadPoolExecutor(DEPTH) as pool:
        list(pool.map(work, [numbers[n::DEPTH] for n in range(DEPTH)]))
    speeds.append(len(numbers) * size / (time.perf_counter() - start_s))


async def _aiofiles(path: Path, size: int, seed: int, speeds: Times, latencies: Times) -> None:
    """Buffered and dropped afterwards: aiofiles has neither O_DIRECT nor a read into a given
    buffer.
    """
    numbers = _numbers(size, seed)

    async def work(share: list[int]) -> None:
        async with aiofiles.open(path, "rb", buffering=0) as file:
            for number in share:
                start_s = time.perf_counter()
                await file.seek(number * size)
                await file.read(size)
                os.posix_fadvise(file.fileno(), number * size, size, os.POSIX_FADV_DONTNEED)
                latencies.append(time.perf_counter() - start_s)

    start_s = time.perf_counter()
    await asyncio.gather(*(work(numbers[n::DEPTH]) for n in range(DEPTH)))
    speeds.append(len(numbers) * size / (time.perf_counter() - start_s))
