"""Pieces cover a record exactly, arrive in any order from many threads, and are hashed in theirs.

Planted faults seen red: a piece hashed before its turn, two threads hashing at once, bytes before
the payload hashed too, no comparison, extents not moved into place.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.manifest.extents import ExpertRecord, Extent, slot_bytes_needed
from expert_store.store.assembly import Assembly, ChecksumDiffers, cut
from proto.expert import RecordKey
from proto.shm import PAGE_BYTES

lengths = st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 30_000)), min_size=1, max_size=4)
pieces_of = st.sampled_from([1, 2, 3, 100]).map(lambda pages: pages * PAGE_BYTES)


def record(gaps: list[tuple[int, int]], data: bytes) -> ExpertRecord:
    """Extents of a file, laid one after another in the slot. gaps: (bytes skipped, length)."""
    extents, offset, place = [], 0, 0
    digest = xxhash.xxh3_64()
    for gap, length in gaps:
        offset += gap
        extents.append(Extent(0, offset, length, place))
        digest.update(data[offset : offset + length])
        offset, place = offset + length, place + length
    return ExpertRecord(RecordKey.exact(0, 0), tuple(extents), (0,), digest.intdigest())


def file_bytes(gaps: list[tuple[int, int]]) -> bytes:
    return random.Random(0).randbytes(sum(map(sum, gaps)))


def read(wanted: ExpertRecord, data: bytes, piece_bytes: int, order: list[int]) -> bytes | None:
    """As readers do, in one order of arrival; None when it never became whole."""
    size = slot_bytes_needed(wanted.extents)
    with mmap(-1, size) as memory, memoryview(memory) as slot:
        assembly = Assembly(wanted, slot, piece_bytes)
        whole = []
        for number in order:
            piece = assembly.pieces[number]
            got = data[piece.offset_bytes : piece.offset_bytes + piece.length_bytes]
            slot[piece.landing_bytes : piece.landing_bytes + len(got)] = got
            whole.append(assembly.arrive(number))
        assert whole[:-1] == [False] * (len(order) - 1)
        return bytes(slot[: wanted.payload_bytes]) if whole[-1] else None


@settings(deadline=None, max_examples=100)
@given(gaps=lengths, piece_bytes=pieces_of, seed=st.integers(0, 99))
def test_any_order_gives_the_record(
    gaps: list[tuple[int, int]], piece_bytes: int, seed: int
) -> None:
    data = file_bytes(gaps)
    wanted = record(gaps, data)
    order = list(range(len(cut(wanted, piece_bytes))))
    random.Random(seed).shuffle(order)
    payload = b"".join(
        data[extent.offset_bytes : extent.offset_bytes + extent.length_bytes]
        for extent in wanted.extents
    )
    assert read(wanted, data, piece_bytes, order) == payload


@settings(deadline=None, max_examples=50)
@given(gaps=lengths, piece_bytes=pieces_of)
def test_pieces_are_whole_pages_and_read_nothing_needless(
    gaps: list[tuple[int, int]], piece_bytes: int
) -> None:
    wanted = record(gaps, file_bytes(gaps))
    pieces = cut(wanted, piece_bytes)
    for piece in pieces:
        assert piece.offset_bytes % PAGE_BYTES == piece.landing_bytes % PAGE_BYTES == 0
        assert piece.length_bytes % PAGE_BYTES == 0 and piece.length_bytes <= piece_bytes
        assert 0 <= piece.length_bytes - piece.needed_bytes < PAGE_BYTES
    assert sum(p.needed_bytes - p.skip_bytes for p in pieces) == wanted.payload_bytes


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_one_wrong_byte_is_found(order: list[int]) -> None:
    gaps = [(0, 3 * PAGE_BYTES)]
    data = bytearray(file_bytes(gaps))
    wanted = record(gaps, bytes(data))
    data[PAGE_BYTES + 7] ^= 1
    with pytest.raises(ChecksumDiffers):
        read(wanted, bytes(data), PAGE_BYTES, order)


def test_one_hashes_at_a_time() -> None:
    """A piece that comes while the one before it is hashed is left to whoever hashes."""
    gaps = [(0, 3 * PAGE_BYTES)]
    data = file_bytes(gaps)
    wanted = record(gaps, data)
    with mmap(-1, len(data)) as memory, memoryview(memory) as slot:
        slot[:] = data
        assembly = Assembly(wanted, slot, PAGE_BYTES)

        class Interrupted:
            """A digest during whose first update the next piece arrives."""

            def __init__(self) -> None:
                self.digest = xxhash.xxh3_64()
                self.num_updates = 0

            def update(self, payload: memoryview) -> None:
                self.num_updates += 1
                if self.num_updates == 1:
                    assert not assembly.arrive(1)
                    assert self.num_updates == 1
                self.digest.update(payload)

            def intdigest(self) -> int:
                return self.digest.intdigest()

        assembly._digest = Interrupted()  # type: ignore[assignment]
        assert not assembly.arrive(0)
        assert assembly.arrive(2)


def test_many_threads_make_it_whole_once() -> None:
    gaps = [(0, 200 * PAGE_BYTES)]
    data = file_bytes(gaps)
    wanted = record(gaps, data)
    with mmap(-1, len(data)) as memory, memoryview(memory) as slot:
        slot[:] = data
        for _ in range(20):
            assembly = Assembly(wanted, slot, PAGE_BYTES)
            with ThreadPoolExecutor(4) as pool:
                assert sum(pool.map(assembly.arrive, range(200))) == 1


def test_who_hashed_before_the_last_piece_came_has_not_made_it_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted fault seen red: whole by what the other thread has hashed meanwhile."""
    gaps = [(0, 3 * PAGE_BYTES)]
    data = file_bytes(gaps)
    with mmap(-1, len(data)) as memory, memoryview(memory) as slot:
        slot[:] = data
        assembly, take = Assembly(record(gaps, data), slot, PAGE_BYTES), Assembly._take
        made_whole = []

        def take_then_the_other(self: Assembly) -> bool | None:
            found = take(self)
            if found is False:
                monkeypatch.undo()
                made_whole.append(assembly.arrive(2))
            return found

        monkeypatch.setattr(Assembly, "_take", take_then_the_other)
        assert not assembly.arrive(1)
        assert not assembly.arrive(0)
        assert made_whole == [True]
