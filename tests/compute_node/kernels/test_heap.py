"""What a prompt frees goes back to the kernel."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The C library keeps what is smaller than the largest that it saw freed.
_GROW = """
import re
from contextlib import nullcontext
from compute_node.kernels import heap

def resident_kib():
    with open("/proc/self/status") as status:
        return int(re.search(r"RssAnon:\\s+(\\d+)", status.read())[1])

before = resident_kib()
with {block}:
    for mib in (24, 23):
        b"x" * (mib << 20)
    inside = resident_kib()
{after}
print(inside - before, resident_kib() - before)
"""


def _growth_mib(block: str, after: str = "") -> tuple[float, float]:
    code = _GROW.format(block=block, after=after)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    inside, at_end = map(int, run.stdout.split())
    return inside / 1024, at_end / 1024


def test_a_prompts_buffers_leave_no_holes() -> None:
    """Red with `nullcontext()` for the block, which the second half shows."""
    inside, at_end = _growth_mib("heap.mapped_buffers()")
    assert inside < 10 and at_end < 10
    inside, _ = _growth_mib("nullcontext()")
    assert inside > 15


def test_what_is_free_is_given_back() -> None:
    _, kept = _growth_mib("nullcontext()")
    _, trimmed = _growth_mib("nullcontext()", "heap.trim()")
    assert kept > 15 and trimmed < 10


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    from compute_node.kernels import heap

    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with heap.mapped_buffers():
        heap.trim()
