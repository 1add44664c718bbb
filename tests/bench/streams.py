"""How fast one token's products stream weights: GB/s of native entries beside a plain read of the
same memory, called as a node calls them.

`python -m tests.bench.streams`. Experts lie in a shared-memory file laid out like the store's
segment and mapped read-only, more of them than any CPU cache holds; `--pages small` leaves its
pages as they come.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import compute_node.model.lean_imports  # noqa: F401  threads wait as in a node
from compute_node.kernels import gemv
from compute_node.native import binding
from expert_store.io import huge_pages
from expert_store.offline.formats import lossless
from tests.bench.table import show, spread

MIB = 1024 * 1024
TOP_K = 4
_ALIGNMENT = 4096
_EVERY_BF16 = 1 << 16

Arrays = list[Tensor]


@dataclass(frozen=True)
class Expert:
    """up: gate_up_proj [2F, D], down: down_proj [D, F]; one array each, or those of twelve bits."""

    up: Arrays
    down: Arrays

    @property
    def length_bytes(self) -> int:
        return sum(array.nbytes for array in (*self.up, *self.down))


def main(
    hidden: int, record_mib: float, num_experts: int, pages: str, rounds: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    inner = int(record_mib * MIB / (6 * hidden)) // 32 * 32
    generator = torch.Generator().manual_seed(0)
    for packed in (False, True):
        made = made_expert(hidden, inner, packed, generator)
        with placed(made, num_experts, pages == "huge") as (experts, huge_mib):
            figures = measured(experts, hidden, inner, packed, rounds)
        form = "lossless" if packed else "exact"
        size_mib = made.length_bytes / MIB
        show(
            f"{num_experts} {form} experts of {size_mib:.1f} MiB, D {hidden}, F {inner}, "
            f"{threads} threads, {huge_mib} MiB mapped by huge pages, {rounds} rounds in turn",
            ["what", "GB/s", "of the plain read"],
            [
                [name, spread(values, 2), f"{max(values) / max(figures['plain read']):.2f}"]
                for name, values in figures.items()
            ],
        )


def made_expert(hidden: int, inner: int, packed: bool, generator: torch.Generator) -> Expert:
    """Of trained weights' size."""
    matrices = [
        torch.randn(shape, generator=generator).mul(0.05).bfloat16()
        for shape in ((2 * inner, hidden), (hidden, inner))
    ]
    if not packed:
        return Expert(*([matrix] for matrix in matrices))
    return Expert(*(lossless.encode(m, lossless.count_outliers(m)) for m in matrices))


@contextmanager
def placed(expert: Expert, count: int, huge: bool) -> Iterator[tuple[list[Expert], int]]:
    """`count` copies in a shared-memory file for the block, and how many MiB this process maps
    of it by huge pages.
    """
    arrays = [*expert.up, *expert.down]
    step = sum(_aligned(array.nbytes) for array in arrays)
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="fm-streams-") as file:
        if huge:
            huge_pages.allocate(file.fileno(), count * step)
        else:
            os.posix_fallocate(file.fileno(), 0, count * step)
        for number in range(count):
            for start, array in _places(arrays, number * step):
                os.pwrite(file.fileno(), array.view(torch.uint8).numpy().tobytes(), start)
        mapping = mmap.mmap(file.fileno(), count * step, prot=mmap.PROT_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            memory = torch.frombuffer(mapping, dtype=torch.uint8)
        int(memory[:: mmap.PAGESIZE].sum())  # every page is mapped
        yield _cut(memory, expert, count, step), _huge_mib(Path(file.name))


def _aligned(length_bytes: int) -> int:
    return -(-length_bytes // _ALIGNMENT) * _ALIGNMENT


def _places(arrays: Sequence[Tensor], start: int) -> Iterator[tuple[int, Tensor]]:
    for array in arrays:
        yield start, array
        start += _aligned(array.nbytes)


def _cut(memory: Tensor, expert: Expert, count: int, step: int) -> list[Expert]:
    found = []
    for number in range(count):
        cut = [
            memory[start : start + array.nbytes].view(array.dtype).view(array.shape)
            for start, array in _places([*expert.up, *expert.down], number * step)
        ]
        found.append(Expert(cut[: len(expert.up)], cut[len(expert.up) :]))
    return found


def _huge_mib(file: Path) -> int:
    """From what the kernel says of this process's mappings of the file."""
    total, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            counted = line.endswith(str(file))
        elif counted and line.startswith("ShmemPmdMapped:"):
            total += int(line.split()[1])
    return total // 1024


def measured(
    experts: list[Expert], hidden: int, inner: int, packed: bool, rounds: int
) -> dict[str, list[float]]:
    """GB/s by what was called, a value a round over all experts; a first round is not counted."""
    products = _Products(hidden, inner, packed)
    calls: dict[str, Callable[[list[Expert]], int]] = {
        "plain read": _read,
        "gate_up alone": products.up,
        "down alone": products.down,
        "experts": products.experts,
    }
    figures: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start_s = time.perf_counter()
            length_bytes = sum(
                call(experts[at : at + TOP_K]) for at in range(0, len(experts), TOP_K)
            )
            if number:
                figures[name].append(length_bytes / (time.perf_counter() - start_s) / 1e9)
    return figures


def _read(experts: list[Expert]) -> int:
    """Returns the bytes read, as every call here does."""
    length_bytes = 0
    for expert in experts:
        for array in (*expert.up, *expert.down):
            whole = array.flatten().view(torch.uint8)
            whole = whole[: len(whole) // 8 * 8].view(torch.int64)
            whole.sum()
            length_bytes += whole.nbytes
    return length_bytes


class _Products:
    """Of one token, by the entries themselves."""

    def __init__(self, hidden: int, inner: int, packed: bool) -> None:
        self._hidden, self._inner, self._packed = hidden, inner, packed
        self._state = torch.randn(1, hidden).bfloat16()
        self._activated = torch.randn(TOP_K, inner).bfloat16()
        self._table = torch.zeros(_EVERY_BF16, dtype=torch.bfloat16)
        self._scratch = torch.empty(3 * TOP_K * inner, dtype=torch.bfloat16)
        self._outputs = torch.empty(TOP_K, 2 * inner, dtype=torch.bfloat16)

    def up(self, experts: list[Expert]) -> int:
        arrays = [array for expert in experts for array in expert.up]
        return self._gemv(arrays, self._state, 2 * self._inner, self._hidden)

    def down(self, experts: list[Expert]) -> int:
        arrays = [array for expert in experts for array in expert.down]
        return self._gemv(arrays, self._activated, self._hidden, self._inner)

    def _gemv(self, arrays: Arrays, inputs: Tensor, rows: int, columns: int) -> int:
        kernels = binding.kernels()
        (kernels.lossless_gemv if self._packed else kernels.gemv)(
            gemv.addresses(arrays), None, TOP_K, inputs.data_ptr(),
            columns if len(inputs) > 1 else 0, self._outputs.data_ptr(), rows, columns,
            gemv.parallel(), torch.get_num_threads(),
        )  # fmt: skip
        return sum(array.nbytes for array in arrays)

    def experts(self, experts: list[Expert]) -> int:
        binding.kernels().experts(
            gemv.addresses([array for expert in experts for array in expert.up]),
            gemv.addresses([array for expert in experts for array in expert.down]),
            self._packed, TOP_K, self._state.data_ptr(), self._table.data_ptr(),
            (ctypes.c_float * TOP_K)(*[0.25] * TOP_K), self._scratch.data_ptr(),
            self._outputs.data_ptr(), self._hidden, self._inner, gemv.parallel(),
            torch.get_num_threads(),
        )  # fmt: skip
        return sum(expert.length_bytes for expert in experts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256, help="D")
    parser.add_argument("--record-mib", type=float, default=24.0, help="of an expert in bf16")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--pages", choices=("huge", "small"), default="huge")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    main(
        given.hidden,
        given.record_mib,
        given.experts,
        given.pages,
        given.rounds,
        given.threads,
    )
