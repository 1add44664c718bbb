"""Record reads against fio on the same file, size and depth, in one run: in memory as it comes and
in huge pages; how they are cut, and what else was tried.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import cast
from unittest import mock

import aiofiles
import xxhash

from expert_store.io import huge_pages, kernel_queue
from expert_store.io.device import Device, ThreadReads
from expert_store.io.files import SourceFiles
from expert_store.manifest.extents import ExpertRecord, Extent
from expert_store.manifest.manifest import Manifest
from expert_store.manifest.sizing import Sizing
from expert_store.store import segment
from expert_store.store.fill import PieceRead
from expert_store.store.readers import Readers
from expert_store.store.sessions import SessionTable
from expert_store.store.slots import SlotPool
from expert_store.store.store import ExpertStore
from proto import expert_store_pb2 as pb
from proto.expert import ModelSpec, RecordKey
from proto.shm import SegmentLayout
from tests.bench.table import percentile, show, spread

KIB, MIB = 1024, 1024 * 1024
SIZES = (256 * KIB, MIB, 3 * MIB, 12 * MIB)
FILE_BYTES = 1024 * MIB
READS_BYTES = 384 * MIB
DEPTH, WANTED, ROUNDS = 4, 8, 5
SHIPPED = "the kernel's queue, pieces of 2 MiB, huge pages, each record verified"
FIO_S = 1

Sample = tuple[float, list[float]]  # bytes/s, seconds of each record
Way = Callable[[Path, int, int], Sample]


def main(folder: Path) -> None:
    path = folder / "records.bin"
    block = os.urandom(16 * MIB)
    with path.open("wb") as file:
        for _ in range(FILE_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    rows = [row for size in SIZES for row in measure(path, size)]
    if shutil.which("fio") is None:
        print("fio is not installed: ratios are of raw preadv (apt-get install fio)")
    first, second = list(ways())[:2]
    show(
        f"Reads of random records, direct, {DEPTH} at the disk at once, {ROUNDS} rounds in any "
        f"order: median (min-max). The store as shipped: {SHIPPED}",
        ["record", "how", "GB/s", f"of {first}", f"of {second}", "p50 ms", "p99 ms"],
        rows,
    )


def ways() -> dict[str, Way]:
    """The first two are what the others are compared with."""
    fio: dict[str, Way] = {}
    if shutil.which("fio"):
        fio = {
            "fio libaio": partial(_fio, "libaio", False),
            "fio libaio, huge pages": partial(_fio, "libaio", True),
            "fio io_uring, huge pages": partial(_fio, "io_uring", True),
        }
    return {
        **fio,
        "raw preadv": _raw,
        "store": partial(_store, 2 * MIB),
        "store, 1 MiB pieces": partial(_store, MIB),
        "store, whole": partial(_store, 64 * MIB),
        "store, single pages": partial(_in_single_pages, 2 * MIB),
        "store, a thread a read": partial(_by_threads, 2 * MIB),
        "aiofiles": _aiofiles,
    }


def measure(path: Path, size: int) -> list[list[object]]:
    found: dict[str, list[Sample]] = {name: [] for name in ways()}
    order = random.Random(size)
    for round_number in range(ROUNDS):
        for name, way in order.sample(sorted(ways().items()), len(ways())):
            found[name].append(way(path, size, round_number))
    first, second = ([speed for speed, _ in found[name]] for name in list(ways())[:2])
    label = f"{size // KIB} KiB" if size < MIB else f"{size // MIB} MiB"
    rows: list[list[object]] = []
    for name, samples in found.items():
        speeds = [speed for speed, _ in samples]
        latencies = [seconds for _, record in samples for seconds in record]
        rows.append(
            [
                label,
                name,
                spread([speed / 1e9 for speed in speeds], 2),
                spread([a / b for a, b in zip(speeds, first, strict=True)], 2),
                spread([a / b for a, b in zip(speeds, second, strict=True)], 2),
                *(f"{percentile(latencies, share) * 1e3:.2f}" for share in (0.5, 0.99)),
            ]
        )
    return rows


def _numbers(size: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(FILE_BYTES // size), READS_BYTES // size)


def _fio(engine: str, is_huge: bool, path: Path, size: int, seed: int) -> Sample:
    command = ["fio", "--name=x", f"--filename={path}", "--rw=randread", f"--bs={size}"]
    command += ["--direct=1", "--readonly", "--time_based", f"--runtime={FIO_S}"]
    command += [f"--ioengine={engine}", f"--iodepth={DEPTH}", f"--randseed={seed + 1}"]
    with _memory(DEPTH * size) if is_huge else nullcontext() as memory:
        command += [f"--mem=mmapshared:{memory}"] if memory else []
        done = subprocess.run([*command, "--output-format=json"], capture_output=True, check=True)
    read = json.loads(done.stdout)["jobs"][0]["read"]
    shares = read["clat_ns"]["percentile"]
    middle, worst = shares["50.000000"] / 1e9, shares["99.000000"] / 1e9
    return read["bw_bytes"], [middle] * 98 + [worst] * 2


@contextmanager
def _memory(length_bytes: int) -> Iterator[Path]:
    """A file of shared memory in huge pages, a little longer than that."""
    memory = Path(f"/dev/shm/flashmoe-bench-fio-{os.getpid()}")
    descriptor = os.open(memory, os.O_RDWR | os.O_CREAT)
    try:
        huge_pages.allocate(descriptor, length_bytes + 4 * MIB)
        yield memory
    finally:
        os.close(descriptor)
        memory.unlink()


def _raw(path: Path, size: int, seed: int) -> Sample:
    numbers, latencies = _numbers(size, seed), list[float]()

    def work(share: list[int]) -> None:
        with mmap(-1, size) as buffer:
            for number in share:
                start_s = time.perf_counter()
                os.preadv(descriptor, [buffer], number * size)
                latencies.append(time.perf_counter() - start_s)

    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    start_s = time.perf_counter()
    with ThreadPoolExecutor(DEPTH) as pool:
        list(pool.map(work, [numbers[n::DEPTH] for n in range(DEPTH)]))
    wall_s = time.perf_counter() - start_s
    os.close(descriptor)
    return len(numbers) * size / wall_s, latencies


def _store(piece_bytes: int, path: Path, size: int, seed: int) -> Sample:
    """The store's own read path, verified, `WANTED` records asked for at any time."""
    numbers, latencies = _numbers(size, seed), list[float]()
    came: queue.SimpleQueue[pb.Lease] = queue.SimpleQueue()
    with _a_store(path, size, piece_bytes) as store:
        session = store.sessions.open("bench", store.sessions.max_leased_bytes, None)

        def ask(number: int) -> None:
            asked[RecordKey.exact(0, number)] = time.perf_counter()
            store.acquire(session, [RecordKey.exact(0, number)], lambda lent: came.put(lent[0]))

        asked: dict[RecordKey, float] = {}
        start_s = time.perf_counter()
        for number in numbers[:WANTED]:
            ask(number)
        for following in [*numbers[WANTED:], *[None] * WANTED]:
            lent = came.get()
            assert not lent.HasField("error") and lent.bytes_read == size
            key = RecordKey.from_pb(lent.key)
            latencies.append(time.perf_counter() - asked[key])
            store.sessions.release(session, [key])
            if following is not None:
                ask(following)
        wall_s = time.perf_counter() - start_s
        store.sessions.close(session)
    return len(numbers) * size / wall_s, latencies


def _in_single_pages(piece_bytes: int, path: Path, size: int, seed: int) -> Sample:
    with mock.patch.object(huge_pages, "lay_out", lambda descriptor, length_bytes: 0):
        return _store(piece_bytes, path, size, seed)


def _by_threads(piece_bytes: int, path: Path, size: int, seed: int) -> Sample:
    def opened(files: SourceFiles, read_depth: int) -> AbstractContextManager[Device[PieceRead]]:
        return nullcontext(ThreadReads(read_depth))

    with mock.patch.object(kernel_queue, "opened", opened):
        return _store(piece_bytes, path, size, seed)


@contextmanager
def _a_store(path: Path, size: int, piece_bytes: int) -> Iterator[ExpertStore]:
    with ExitStack() as stack:
        shm = Path(f"/dev/shm/flashmoe-bench-{os.getpid()}")
        shared = stack.enter_context(segment.create(shm, SegmentLayout(WANTED + DEPTH, size)))
        files = SourceFiles([path], True, stack)
        slots, lock = SlotPool(shared), threading.RLock()
        manifest = Manifest(
            "packed", cast(ModelSpec, None), cast(Sizing, None), ".", (), _records(path, size)
        )
        lease_bytes = manifest.size_classes.lease_bytes
        sessions = SessionTable(slots, lock, WANTED * size, lease_bytes, path.parent, 0.1)
        device = stack.enter_context(kernel_queue.opened(files, DEPTH))
        limits = (DEPTH, 4096, piece_bytes)
        store = ExpertStore(manifest, shared, slots, sessions, lock, *limits, files.direct, device)
        stack.enter_context(Readers(store, files))
        yield store


_known: dict[int, dict[RecordKey, ExpertRecord]] = {}


def _records(path: Path, size: int) -> dict[RecordKey, ExpertRecord]:
    if size not in _known:
        _known[size] = {}
        with path.open("rb") as file:
            for number in range(FILE_BYTES // size):
                checksum = xxhash.xxh3_64_intdigest(file.read(size))
                key, extent = RecordKey.exact(0, number), Extent(0, number * size, size, 0)
                _known[size][key] = ExpertRecord(key, (extent,), (0,), checksum)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return _known[size]


def _aiofiles(path: Path, size: int, seed: int) -> Sample:
    """Buffered and dropped afterwards: aiofiles has neither O_DIRECT nor a read into a given
    buffer.
    """
    return asyncio.run(_read_aiofiles(path, size, seed))


async def _read_aiofiles(path: Path, size: int, seed: int) -> Sample:
    numbers, latencies = _numbers(size, seed), list[float]()

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
    return len(numbers) * size / (time.perf_counter() - start_s), latencies
