"""The memory report on a disk that fills up: never half, never old without saying so.

Planted faults seen red: the partial file left behind, no time of writing, a failure not counted.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from deploy.report.status import collect_status
from deploy.stack.memory import MemorySampler
from deploy.stack.run_dir import RunDir
from proto import stats
from proto.memory_report import FILE_NAME, MemoryReport
from proto.stats import Stats
from tests.expert_store.conftest import SmallDisk, small_disk  # noqa: F401  a fixture


def test_a_full_disk_is_counted_and_leaves_the_report_as_it_was(
    small_disk: SmallDisk,  # noqa: F811
) -> None:
    sampler = MemorySampler(small_disk.path, 5, 6, 7)
    sampler.write()
    written = (small_disk.path / FILE_NAME).read_bytes()
    ballast = small_disk.path / "ballast"
    ballast.write_bytes(b"x" * small_disk.free_bytes)
    sampler.write()
    sampler.write()
    assert sampler.report.write_failures == 2
    assert "memory.json cannot be written (No space left" in sampler.problem
    assert (small_disk.path / FILE_NAME).read_bytes() == written
    assert {path.name for path in small_disk.path.iterdir()} == {FILE_NAME, "ballast"}
    ballast.unlink()
    sampler.write()
    report = MemoryReport.read(small_disk.path)
    assert report is not None and report.write_failures == 2 and sampler.problem == ""


def test_its_age_is_told(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red before: figures of an hour ago look like those of now."""
    sampler = MemorySampler(run_dir, 5, 6, 7)
    sampler.sample({"launcher": os.getpid()})
    report = MemoryReport.read(run_dir)
    assert report is not None and report.age_s < 60
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 3600)
    assert report.age_s == pytest.approx(3600, abs=60)
    assert collect_status(RunDir(run_dir))["memory"]["age_s"] == pytest.approx(3600, abs=60)


def test_metrics_are_made_of_it() -> None:
    """Red when the parts shown are those of the peak."""
    report = MemoryReport(1 << 30, 1 << 29, 3, {"segment": 9}, parts={"segment": 1, "launcher": 2})
    found = Stats.from_pb(stats.snapshot(*report.sources()))
    parts = {name: part.memory_part_bytes for name, part in found.by("part").items()}
    assert parts == {"segment": 1, "launcher": 2}
    assert (found.memory_ceiling, found.memory_peak) == (1 << 30, 1 << 29)
