"""The ceiling holds under a real memory cgroup, and reads leave no page cache behind.

Fault seen red: buffered reads whose read-ahead stays in the page cache.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from expert_store.manifest.manifest import Manifest
from expert_store.offline.index import index
from tests.checkpoints import make
from tests.stack import MODEL, flashmoe, served

pytestmark = pytest.mark.system
MIB = 1024 * 1024
CGROUPS = Path("/sys/fs/cgroup/memory")
PAGE = mmap.PAGESIZE


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """An empty memory cgroup (v1)."""
    path = CGROUPS / f"flashmoe-test-{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir()
        (path / "memory.limit_in_bytes").read_text()
    except OSError as error:
        pytest.skip(f"memory cgroups (v1) cannot be written here: {error}")
    yield path
    path.rmdir()


def enter_and_run(cgroup: Path) -> list[str]:
    """A command prefix whose process moves itself into the cgroup before it becomes flashmoe."""
    script = f'echo $$ > {cgroup}/cgroup.procs && exec "$0" "$@"'
    return ["sh", "-c", script, sys.executable, "-m", "deploy.cli"]


@pytest.fixture(scope="module")
def large_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of 3 MiB, 768 MiB in all: more than the ceiling leaves for them."""
    folder = tmp_path_factory.mktemp("large")
    make(
        "qwen3_moe",
        folder / "model",
        hidden_size=512,
        moe_intermediate_size=1024,
        num_experts=64,
        num_hidden_layers=4,
        head_dim=64,
        max_position_embeddings=2048,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, folder / "model" / name)
    index(folder / "model", folder / "store")
    return folder / "store"


def test_stack_stays_under_its_ceiling_in_a_cgroup(
    large_store: Path, run_dir: Path, cgroup: Path
) -> None:
    ceiling = 1100 * MIB
    (cgroup / "memory.limit_in_bytes").write_text(str(ceiling))
    flags = ["--memory", "1100MiB", "--experts-memory", "300MiB"]
    ids = [(7 * n + n * n) % 125 + 3 for n in range(400)]
    with served(large_store, run_dir, *flags, command=enter_and_run(cgroup)) as stack:
        with stack.client() as node:
            for shift in range(3):
                prompt = [(token + shift) % 125 + 3 for token in ids]
                result = node.generate(prompt, max_tokens=48, ignore_eos=True).run()
                assert len(result.token_ids) == 48
                assert result.prefill.misses + result.decode.misses > 100
        answer = flashmoe("generate", "x", "--run-dir", str(run_dir), "--max-tokens", "2", "--json")
        found = json.loads(answer.stdout) if answer.returncode == 0 else {}
        assert stack.status()["expert_store"]["bytes_read"] > 768 * MIB
        report = stack.status()["memory"]
    assert report["peak_bytes"] <= ceiling, (report, found)
    kills = (cgroup / "memory.oom_control").read_text()
    assert "oom_kill 0" in kills, kills


def test_cgroup_smaller_than_the_ceiling_is_refused_up_front(
    tiny_store: Path, run_dir: Path, cgroup: Path
) -> None:
    (cgroup / "memory.limit_in_bytes").write_text(str(700 * MIB))
    flags = ["serve", "--model", str(tiny_store), "--memory", "1GiB", "--run-dir", str(run_dir)]
    refused = subprocess.run(
        [*enter_and_run(cgroup), *flags], capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 3
    assert "cgroup's limit of 700 MiB" in refused.stderr


def test_memory_that_others_hold_is_refused_up_front(
    tiny_store: Path, run_dir: Path, cgroup: Path
) -> None:
    """Red before: `ready`, and then the kernel kills whoever it chooses."""
    (cgroup / "memory.limit_in_bytes").write_text(str(700 * MIB))
    hold = f"held = bytearray({200 * MIB}); print('held', flush=True); input()"
    enter = ["sh", "-c", f'echo $$ > {cgroup}/cgroup.procs && exec "$0" "$@"']
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    flags = ["serve", "--model", str(tiny_store), "--memory", "690MiB", "--run-dir", str(run_dir)]
    with subprocess.Popen([*enter, sys.executable, "-c", hold], **pipes) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        refused = subprocess.run(
            [*enter_and_run(cgroup), *flags], capture_output=True, text=True, timeout=60
        )
        other.communicate("\n")
    assert other.returncode == 0, "it lives"
    assert refused.returncode == 3
    assert "available now beside what other processes hold" in refused.stderr


def test_too_small_a_ceiling_names_the_smallest_that_works(
    large_store: Path, run_dir: Path
) -> None:
    flags = ["--model", str(large_store), "--run-dir", str(run_dir)]
    refused = flashmoe("serve", *flags, "--memory", "300MiB")
    assert refused.returncode == 3 and "the smallest that works is" in refused.stderr
    refused = flashmoe("serve", *flags, "--memory", "4GiB", "--experts-memory", "15")
    assert refused.returncode == 3 and "give at least 16" in refused.stderr


def resident_pages(path: Path, offset_bytes: int, length_bytes: int) -> int:
    """Pages of a file's range that are in the page cache, by mincore(2)."""
    start = offset_bytes // PAGE * PAGE
    length = offset_bytes + length_bytes - start
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    descriptor = os.open(path, os.O_RDONLY)
    address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, start)
    os.close(descriptor)
    flags = (ctypes.c_ubyte * -(-length // PAGE))()
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), flags) == 0
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(length))
    return sum(flag & 1 for flag in flags)


@pytest.mark.parametrize("direct_io", ["true", "false"])
def test_reads_leave_no_page_cache(
    large_store: Path, run_dir: Path, direct_io: str, tmp_path: Path
) -> None:
    manifest = Manifest.load(large_store)
    path = manifest.root(large_store) / manifest.files[0].path
    size = path.stat().st_size
    settings = tmp_path / "flashmoe.toml"
    settings.write_text(f"[expert_store]\ndirect_io = {direct_io}\n")
    flags = ["--experts-memory", "32", "--config", str(settings)]
    with served(large_store, run_dir, *flags) as stack:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = resident_pages(path, 0, size)
        with stack.client() as node:
            result = node.generate(list(range(3, 120)), max_tokens=16, ignore_eos=True).run()
        read = result.prefill.bytes_read + result.decode.bytes_read
        grown = (resident_pages(path, 0, size) - before) * PAGE
    assert read > 300 * MIB
    assert grown < read * 0.02, f"{grown} bytes of page cache after reading {read}"
