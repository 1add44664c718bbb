"""Measures what the stack uses: the sum of PSS of its processes, and its peak.

Anonymous memory is read every time (a counter the kernel keeps). File-mapped and shared pages need
a walk over page tables (10 ms for a torch process), and change slowly: they are walked now and
then.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from deploy.plan import cgroup
from proto.memory_report import FILE_NAME, MemoryReport

_WALK_INTERVAL_S = 2.0
_WRITE_INTERVAL_S = 0.5


class MemorySampler:
    """Samples the memory of a stack's processes and writes the report.

    segment_bytes: allocated in full at start, so it counts in full
    dense_bytes:   shown apart from the node
    problem:       why the last report could not be written; empty when it was
    """

    def __init__(
        self, run_dir: Path, ceiling_bytes: int, segment_bytes: int, dense_bytes: int
    ) -> None:
        self._path = run_dir / FILE_NAME
        self._segment_bytes = segment_bytes
        self._dense_bytes = dense_bytes
        self._file_bytes: dict[int, int] = {}
        self._walked_s = 0.0
        self._written_s = 0.0
        self.report = MemoryReport(ceiling_bytes)
        self.problem = ""

    def sample(self, processes: Mapping[str, int]) -> None:
        """Measure every process once. processes: pid by name; one that is gone counts nothing"""
        now = time.monotonic()
        if now - self._walked_s > _WALK_INTERVAL_S or set(self._file_bytes) != set(
            processes.values()
        ):
            self._file_bytes = {pid: file_pss_bytes(pid) for pid in processes.values()}
            self._walked_s = now
        parts = {
            name: anonymous_bytes(pid) + self._file_bytes.get(pid, 0)
            for name, pid in processes.items()
        }
        parts["segment"] = self._segment_bytes
        if parts.get("compute_node", 0) > self._dense_bytes:
            parts["compute_node"] -= self._dense_bytes
            parts["dense_weights"] = self._dense_bytes
        self._record(parts)
        if now - self._written_s > _WRITE_INTERVAL_S:
            self.write()
            self._written_s = now

    def write(self) -> None:
        """Replace the report. A disk that refuses is counted and kept in `problem`, not raised."""
        self.report.cgroup_peak_bytes = cgroup.peak_bytes()
        self.report.written_at_s = time.time()
        partial = self._path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(asdict(self.report)))
            partial.replace(self._path)
        except OSError as error:
            self.report.write_failures += 1
            self.problem = f"{self._path} cannot be written ({error.strerror})"
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        else:
            self.problem = ""

    def _record(self, parts: dict[str, int]) -> None:
        self.report.parts, self.report.current_bytes = parts, sum(parts.values())
        if self.report.current_bytes > self.report.peak_bytes:
            self.report.peak_bytes = self.report.current_bytes
            self.report.by_part = parts


def anonymous_bytes(pid: int) -> int:
    return _kilobytes(f"/proc/{pid}/status", "RssAnon")


def file_pss_bytes(pid: int) -> int:
    return _kilobytes(f"/proc/{pid}/smaps_rollup", "Pss_File")


def _kilobytes(path: str, field_name: str) -> int:
    try:
        with open(path) as file:
            for line in file:
                if line.startswith(field_name + ":"):
                    return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it ended between two looks
    return 0
