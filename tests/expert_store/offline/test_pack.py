"""A packed store is self-contained, resumable, and never half there.

Planted faults seen red: records not page aligned, the journal flushed before the records are on
disk, the target moved away before the new one is whole, a leftover of a killed run in the way,
a whole tensor read at once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors.torch import load_file

from expert_store.io.files import SourceFiles
from expert_store.manifest.manifest import MANIFEST_NAME, Manifest, check_sources
from expert_store.offline import pack as module
from expert_store.offline import record_file as records_module
from expert_store.offline.checkpoint import files as checkpoint_module
from expert_store.offline.companions import DENSE_NAME
from expert_store.offline.index import index
from expert_store.offline.pack import pack
from expert_store.offline.record_file import JOURNAL_NAME, RECORDS_NAME
from expert_store.offline.verify import verify
from expert_store.store.verified_read import read_record
from proto import errors
from tests.checkpoints import make
from tests.expert_store.conftest import SmallDisk


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors_of(store_dir: Path, root: Path) -> dict[str, bytes]:
    """Every expert's tensors as the daemon would deliver them."""
    manifest, found = Manifest.load(store_dir), {}
    slot = bytearray(manifest.slot_bytes)
    with ExitStack() as stack:
        sources = SourceFiles([root / file.path for file in manifest.files], False, stack)
        for key, record in manifest.records.items():
            read_record(sources, record, memoryview(slot))
            layout = manifest.spec.layouts[key.expert.layer]
            for tensor, offset in zip(layout, record.tensor_offsets, strict=True):
                found[f"{key} {tensor.name}"] = bytes(slot[offset : offset + tensor.length_bytes])
    return found


@pytest.mark.parametrize("name", ["mixtral", "granitemoe", "gpt_oss"])
@pytest.mark.parametrize("max_shard_size", ["50KB", "5GB"])
def test_packed_and_indexed_deliver_the_same(
    name: str, max_shard_size: str, tmp_path: Path
) -> None:
    root = make(name, tmp_path / "checkpoint", max_shard_size=max_shard_size)
    index(root, tmp_path / "indexed")
    manifest = pack(root, tmp_path / "packed")
    assert tensors_of(tmp_path / "packed", tmp_path / "packed") == tensors_of(
        tmp_path / "indexed", root
    )
    starts = [record.extents[0].offset_bytes for record in manifest.records.values()]
    assert all(start % 4096 == 0 for start in starts)


def test_it_stands_alone(checkpoint: Path, packed: Path, tmp_path: Path) -> None:
    """Moved, and its checkpoint gone: dense weights, config and records are all there."""
    moved = tmp_path / "moved"
    shutil.copytree(packed, moved)
    manifest = Manifest.load(moved)
    check_sources(manifest, manifest.root(moved), times=False)
    assert verify(moved) == []
    dense = load_file(moved / DENSE_NAME)
    original = load_file(checkpoint / "model.safetensors")
    assert set(dense) == {tensor.name for tensor in manifest.spec.dense}
    assert all(dense[name].equal(original[name]) for name in dense)
    assert (moved / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
    assert {path.name for path in moved.iterdir()} >= {RECORDS_NAME, DENSE_NAME, MANIFEST_NAME}
    assert not (moved / JOURNAL_NAME).exists()


KILLED_HALFWAY = """
import os, signal, sys
from pathlib import Path
from expert_store.offline import pack as module
from expert_store.offline import record_file
record_file._SYNC_BYTES = 1
def report(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
module.pack(Path(sys.argv[1]), Path(sys.argv[2]), report)
"""


def test_killed_and_started_again_gives_the_same_bytes(
    checkpoint: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, partial = tmp_path / "store", tmp_path / "store.partial"
    command = [sys.executable, "-c", KILLED_HALFWAY, str(checkpoint), str(target)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert not target.exists()
    assert len((partial / JOURNAL_NAME).read_text().splitlines()) > 10
    written = record_writes(monkeypatch)
    pack(checkpoint, target)
    assert 0 < sum(written) < (packed / RECORDS_NAME).stat().st_size * 0.6, "it started over"
    check_same_store(target, packed)
    assert not partial.exists()


def check_same_store(target: Path, packed: Path) -> None:
    assert Manifest.load(target).records == Manifest.load(packed).records
    assert Manifest.load(target).spec == Manifest.load(packed).spec
    ours, theirs = content(target), content(packed)
    assert set(ours) == set(theirs)
    assert all(ours[name] == theirs[name] for name in ours if name != MANIFEST_NAME)


def record_writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes written to the record file, write by write."""
    real, sizes = os.pwrite, []

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(RECORDS_NAME):
            sizes.append(len(data))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return sizes


def interrupt_halfway(root: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(records_module, "_SYNC_BYTES", 1)
        with pytest.raises(KeyboardInterrupt):
            pack(root, target, interrupt)
    return target.with_name(target.name + ".partial")


def test_a_journal_without_its_records_is_not_believed(
    checkpoint: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when records somebody deleted are taken for written: the store would be full of holes."""
    partial = interrupt_halfway(checkpoint, tmp_path / "store", monkeypatch)
    (partial / RECORDS_NAME).unlink()
    pack(checkpoint, tmp_path / "store")
    check_same_store(tmp_path / "store", packed)


def test_the_journal_promises_only_what_is_on_disk(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_fsync, real_fdatasync = os.fsync, os.fdatasync

    def name(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    monkeypatch.setattr(os, "fsync", lambda d: (events.append(name(d)), real_fsync(d)))
    monkeypatch.setattr(os, "fdatasync", lambda d: (events.append(name(d)), real_fdatasync(d)))
    interrupt_halfway(checkpoint, tmp_path / "store", monkeypatch)
    steps = [event for event in events if event in (RECORDS_NAME, JOURNAL_NAME)]
    assert steps[0] == JOURNAL_NAME, "the task"
    assert steps[1:] == [RECORDS_NAME, JOURNAL_NAME] * (len(steps) // 2)
    assert len(steps) > 10


def test_memory_is_bounded_by_a_chunk(
    checkpoint: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing larger than a chunk (or a page of padding) is read or written at once."""
    assert checkpoint_module._CHUNK_BYTES <= 4 * 1024 * 1024
    monkeypatch.setattr(checkpoint_module, "_CHUNK_BYTES", 1000)
    read, real, written = [], os.pread, record_writes(monkeypatch)

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        read.append(length)
        return real(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    pack(checkpoint, tmp_path / "store")
    assert (max(read), max(written)) <= (1000, 4096)
    check_same_store(tmp_path / "store", packed)


def test_an_existing_store_is_kept_unless_told(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / MANIFEST_NAME).write_text("old")
    with pytest.raises(errors.ManifestInvalid, match="--overwrite"):
        pack(checkpoint, tmp_path / "store")
    assert content(tmp_path / "store") == {MANIFEST_NAME: b"old"}
    pack(checkpoint, tmp_path / "store", overwrite=True)
    assert verify(tmp_path / "store") == []
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_store_is_never_replaced(
    overwrite: bool, checkpoint: Path, tmp_path: Path
) -> None:
    """A folder of other things, or the checkpoint itself."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine").write_text("precious")
    for target in (tmp_path / "home", checkpoint, checkpoint.parent):
        before = sorted(target.iterdir())
        with pytest.raises(errors.ManifestInvalid, match="give another --out"):
            pack(checkpoint, target, overwrite=overwrite)
        assert sorted(target.iterdir()) == before


def test_what_a_killed_overwrite_left_is_no_obstacle(checkpoint: Path, tmp_path: Path) -> None:
    """Red without removing it: the rename onto a folder that is not empty fails, with OSError."""
    for name in ("store", "store.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST_NAME).write_text("old")
    pack(checkpoint, tmp_path / "store", overwrite=True)
    assert verify(tmp_path / "store") == []
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("foreseen", [True, False], ids=["foreseen", "unforeseen"])
def test_a_full_disk_leaves_the_target_as_it_was(
    existing: bool,
    foreseen: bool,
    checkpoint: Path,
    packed: Path,
    small_disk: SmallDisk,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Foreseen, or when another program takes the space meanwhile; with space it goes on."""
    target = small_disk.path / "store"
    before = {MANIFEST_NAME: b"precious" * 100}
    if existing:
        target.mkdir()
        (target / MANIFEST_NAME).write_bytes(before[MANIFEST_NAME])
    small_disk.resize(300_000)
    with monkeypatch.context() as patched:
        if not foreseen:
            patched.setattr(module, "check_space", lambda *_: None)
        reason = "packing needs" if foreseen else "the disk is full.*it resumes"
        with pytest.raises(errors.ManifestInvalid, match=reason):
            pack(checkpoint, target, overwrite=existing)
    assert content(target) == before if existing else not target.exists()
    small_disk.resize(4_000_000)
    pack(checkpoint, target, overwrite=existing)
    check_same_store(target, packed)


def test_a_full_disk_while_publishing_costs_only_the_manifest(
    checkpoint: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when the journal is gone by then: the next run would copy everything again."""

    def full(self: Manifest, folder: Path) -> None:
        raise errors.ManifestInvalid("No space left")

    with monkeypatch.context() as patched:
        patched.setattr(Manifest, "write", full)
        with pytest.raises(errors.ManifestInvalid, match="No space"):
            pack(checkpoint, tmp_path / "store")
    written = record_writes(monkeypatch)
    pack(checkpoint, tmp_path / "store")
    assert written == []
    check_same_store(tmp_path / "store", packed)


def test_a_target_that_is_a_file_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("mine")
    with pytest.raises(errors.ManifestInvalid, match="is a file: give another --out"):
        pack(checkpoint, tmp_path / "store", overwrite=True)
    assert (tmp_path / "store").read_text() == "mine"


def test_a_damaged_source_is_named(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "broken")
    config = json.loads((tmp_path / "broken" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "broken" / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.CheckpointUnsupported, match="fp8"):
        pack(tmp_path / "broken", tmp_path / "store")
    assert not (tmp_path / "store").exists()
