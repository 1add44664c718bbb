"""What the cgroups of a process leave it, in both versions, seen from a host and from a container.

Planted faults seen red: the limit of a parent not read, page cache counted as taken, `max` and
v1's huge number taken for limits.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from deploy.plan import cgroup

MIB = 1024 * 1024
UNLIMITED = str(0x7FFFFFFFFFFFF000)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the hierarchies lie; the test writes the process's membership beside them."""
    monkeypatch.setattr(cgroup, "_SYSTEM", tmp_path)
    hierarchies = tmp_path / "sys/fs/cgroup"
    hierarchies.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").symlink_to(hierarchies / "membership")
    return hierarchies


def v1(folder: Path, limit: str, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    stat = f"cache 1\ninactive_file 0\nactive_file 0\ntotal_inactive_file {cache}\n"
    (folder / "memory.stat").write_text(f"{stat}total_active_file 1048576\n")


def v2(folder: Path, limit: str, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\ninactive_file {cache}\nactive_file {MIB}\n")


def found() -> tuple[int | None, int]:
    """Limit and what is available, in MiB."""
    limit = cgroup.limit_bytes()
    return limit and limit // MIB, cgroup.available_bytes() // MIB


@pytest.mark.parametrize(
    ("write", "folder", "line"), [(v1, "memory", "4:memory:{}\n3:cpu:/x"), (v2, "", "0::{}")]
)
def test_limits_of_a_group_and_those_above(  # type: ignore[no-untyped-def]
    write, folder: str, line: str, root: Path
) -> None:
    (root / "membership").write_text(line.format("/outer/inner") + "\n")
    unlimited = UNLIMITED if folder else "max"
    write(root / folder / "outer/inner", unlimited, 30 * MIB, 0)
    write(root / folder / "outer", str(100 * MIB), 50 * MIB, 9 * MIB)
    assert found() == (100, 60), "100 less 50, of which 10 are page cache"
    write(root / folder / "outer/inner", str(70 * MIB), 30 * MIB, 0)
    assert found() == (70, 41)
    write(root / folder / "outer/inner", str(70 * MIB), 90 * MIB, 0)
    assert found() == (70, 0), "it never is less than nothing"


@pytest.mark.parametrize(
    ("write", "folder", "line"), [(v1, "memory", "4:memory:{}"), (v2, "", "0::{}")]
)
@pytest.mark.parametrize("path", ["/", "/docker/0123abcd"])
def test_in_a_container_its_own_group_is_the_root(  # type: ignore[no-untyped-def]
    write, folder: str, line: str, path: str, root: Path
) -> None:
    (root / "membership").write_text(line.format(path) + "\n")
    write(root / folder, str(64 * MIB), 16 * MIB, 3 * MIB)
    assert found() == (64, 52)


def test_without_a_limit_it_is_what_the_machine_has(root: Path) -> None:
    (root / "membership").write_text("4:memory:/\n0::/\n")
    v1(root / "memory", UNLIMITED, 9 * MIB, 0)
    assert cgroup.limit_bytes() is None
    assert cgroup.available_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("memory/own/memory.max_usage_in_bytes", "4:memory:{}\n3:cpu:/x"),
        ("own/memory.peak", "0::{}"),
    ],
)
def test_only_a_group_of_its_own_has_a_peak(file: str, line: str, root: Path) -> None:
    """In the topmost group everybody on the machine counts."""
    (root / file).parent.mkdir(parents=True)
    (root / file).write_text(f"{5 * MIB}\n")
    (root / file).parent.parent.joinpath(Path(file).name).write_text(f"{9 * MIB}\n")
    (root / "membership").write_text(line.format("/own") + "\n")
    assert cgroup.peak_bytes() == 5 * MIB
    (root / "membership").write_text(line.format("/") + "\n")
    assert cgroup.peak_bytes() is None
