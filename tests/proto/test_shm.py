"""The segment's header and generations.

Planted faults seen red: no check of the claimed size against the file's, no bound on num_slots,
slot_bytes of 0 accepted, every generation at one place.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proto import errors, shm
from proto.shm import PAGE_BYTES, SegmentLayout

layouts = st.builds(
    lambda num_slots, pages, most_parts: SegmentLayout(
        num_slots, pages * PAGE_BYTES, min(most_parts, pages)
    ),
    st.integers(1, 2000),
    st.integers(1, 64),
    st.integers(1, 8),
)
u64 = st.integers(0, (1 << 64) - 1)


def header(magic: bytes, version: int, most_parts: int, slot_bytes: int, num_slots: int) -> bytes:
    return struct.pack("<8sIIQQQ", magic, version, most_parts, 7, slot_bytes, num_slots)


def read(data: bytes, file_bytes: int) -> tuple[SegmentLayout, int] | None:
    """None: refused with the one error that a reader may see."""
    try:
        return shm.read_header(memoryview(data), file_bytes)
    except errors.SegmentInvalid:
        return None


@given(layouts, u64)
def test_a_header_returns_as_it_was_written(layout: SegmentLayout, epoch: int) -> None:
    buffer = memoryview(bytearray(PAGE_BYTES))
    shm.write_header(buffer, layout, epoch)
    assert read(buffer.tobytes(), layout.segment_bytes) == (layout, epoch)
    assert read(buffer.tobytes(), layout.segment_bytes - 1) is None


@given(st.binary(max_size=100), st.integers(0, 1 << 40))
@example(b"", 0)
@example(b"FLASHMOE", 1 << 40)
def test_bytes_at_random_are_refused(data: bytes, file_bytes: int) -> None:
    assert read(data, file_bytes) is None


@settings(max_examples=300)
@example(b"FLASHMOE", 2, 1, PAGE_BYTES, 1 << 24, 1 << 40)
@example(b"FLASHMOE", 2, 1, PAGE_BYTES, (1 << 24) + 1, 1 << 40)
@example(b"FLASHMOE", 2, 1, 0, 1, 1 << 40)
@example(b"FLASHMOE", 2, 0, PAGE_BYTES, 1, 1 << 40)
@example(b"FLASHMOE", 2, 2, PAGE_BYTES, 1, 1 << 40)
@example(b"FLASHMOE", 1, 1, PAGE_BYTES, 1, 1 << 40)
@given(
    magic=st.sampled_from([b"FLASHMOE", b"FLASHMOF"]),
    version=st.sampled_from([0, 1, 2, 3]),
    most_parts=st.sampled_from([0, 1, 2, 1 << 31]),
    slot_bytes=st.sampled_from([0, 1, PAGE_BYTES, 2 * PAGE_BYTES, 1 << 63]) | u64,
    num_slots=st.sampled_from([0, 1, 1 << 24, (1 << 24) + 1]) | u64,
    file_bytes=st.integers(0, 1 << 40),
)
def test_what_is_accepted_fits_its_file(
    magic: bytes, version: int, most_parts: int, slot_bytes: int, num_slots: int, file_bytes: int
) -> None:
    found = read(header(magic, version, most_parts, slot_bytes, num_slots), file_bytes)
    sane = 0 < num_slots <= 1 << 24 and slot_bytes and slot_bytes % PAGE_BYTES == 0
    sane = sane and 0 < most_parts * PAGE_BYTES <= slot_bytes
    fits = sane and SegmentLayout(num_slots, slot_bytes, most_parts).segment_bytes <= file_bytes
    accepted = magic == b"FLASHMOE" and version == 2 and fits
    assert (found is not None) == bool(accepted)


@given(layouts)
def test_slots_are_aligned_and_do_not_touch_the_header(layout: SegmentLayout) -> None:
    offsets = [layout.slot_offset_bytes(slot) for slot in range(layout.num_slots)]
    num_generations = layout.num_slots * layout.most_parts
    assert offsets[0] == layout.header_bytes >= PAGE_BYTES + 8 * num_generations
    assert all(offset % PAGE_BYTES == 0 for offset in offsets)
    assert offsets[-1] + layout.slot_bytes == layout.segment_bytes


@pytest.mark.parametrize(
    ("num_slots", "header_bytes"), [(1, 8192), (512, 8192), (513, 12288), (8192, 69632)]
)
def test_a_segment_of_whole_slots_is_laid_out_as_ever(num_slots: int, header_bytes: int) -> None:
    layout = SegmentLayout(num_slots, 3 * PAGE_BYTES)
    assert layout.header_bytes == header_bytes
    assert layout.segment_bytes == header_bytes + num_slots * 3 * PAGE_BYTES
    assert layout.part_bytes(1) == layout.slot_bytes


@given(st.lists(st.lists(u64, min_size=3, max_size=3), min_size=1, max_size=20))
def test_each_part_has_a_generation_of_its_own(generations: list[list[int]]) -> None:
    layout = SegmentLayout(len(generations), 3 * PAGE_BYTES, 3)
    buffer = memoryview(bytearray(layout.header_bytes))
    for slot, parts in enumerate(generations):
        for part, generation in enumerate(parts):
            shm.write_generation(buffer, layout, slot, part, generation)
    found = [
        [shm.read_generation(buffer, layout, slot, part) for part in range(3)]
        for slot in range(len(generations))
    ]
    assert found == generations


@pytest.mark.parametrize(("value", "aligned"), [(0, 0), (1, 4096), (4096, 4096), (4097, 8192)])
def test_alignment_goes_up(value: int, aligned: int) -> None:
    assert shm.align_up(value) == aligned
