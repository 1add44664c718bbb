"""A share has the bytes, checksums and fingerprint of its store, stands alone, and is never half
there.

Written against: records not on whole pages, tensors moved off their alignment, a gap kept
between runs read as payload, a damaged record copied, the journal of another share gone on with,
the dense weights' places taken from the store.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from expert_store.io.files import SourceFiles
from expert_store.manifest.manifest import MANIFEST_NAME, Manifest
from expert_store.manifest.share import Share
from expert_store.offline import record_file
from expert_store.offline import shard as module
from expert_store.offline.companions import DENSE_NAME
from expert_store.offline.index import index
from expert_store.offline.pack import pack
from expert_store.offline.record_file import JOURNAL_NAME, RECORDS_NAME
from expert_store.offline.shard import shard
from expert_store.offline.verify import verify
from expert_store.store.verified_read import read_record
from proto import errors
from tests.checkpoints import make
from tests.expert_store.conftest import SmallDisk
from tests.expert_store.stores import flip


def tensors_of(store_dir: Path) -> dict[str, bytes]:
    """Every expert's tensors as the daemon would deliver them."""
    manifest, found = Manifest.load(store_dir), {}
    root, slot = manifest.root(store_dir), bytearray(manifest.slot_bytes)
    with ExitStack() as stack:
        sources = SourceFiles([root / file.path for file in manifest.files], False, stack)
        for key, record in manifest.records.items():
            read_record(sources, record, memoryview(slot))
            layout = manifest.spec.variant(key.variant).layouts[key.expert.layer]
            for tensor, offset in zip(layout, record.tensor_offsets, strict=True):
                found[f"{key} {tensor.name}"] = bytes(slot[offset : offset + tensor.length_bytes])
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module", params=["in place", "in place, small files", "packed", "variants"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    size = "50KB" if "small" in request.param else "5GB"
    root = make("gpt_oss", folder / "checkpoint", max_shard_size=size)
    if request.param.startswith("in place"):
        index(root, folder / "store")
    else:
        variants = ["int4"] if request.param == "variants" else []
        pack(root, folder / "store", weight_format="bf16", variants=variants)
    return folder / "store"


def test_shares_together_are_the_store(store: Path, tmp_path: Path) -> None:
    whole, expected = Manifest.load(store), tensors_of(store)
    found: dict[str, bytes] = {}
    for owner in (1, 2, 3):
        target = tmp_path / str(owner)
        made = shard(store, Share(owner, 3), target)
        manifest = Manifest.load(target)
        assert manifest == made and manifest.share == Share(owner, 3)
        assert manifest.spec.fingerprint == whole.spec.fingerprint
        assert all(whole.records[key].checksum == r.checksum for key, r in manifest.records.items())
        starts = [record.extents[0].offset_bytes for record in manifest.records.values()]
        assert all(start % 4096 == 0 for start in starts)
        assert manifest.slot_bytes <= whole.slot_bytes
        assert verify(target) == []
        found |= tensors_of(target)
        assert set(os.listdir(target)) >= {RECORDS_NAME, DENSE_NAME, MANIFEST_NAME, "config.json"}
        assert JOURNAL_NAME not in os.listdir(target)
        share = len(manifest.records) / len(whole.records)
        assert (target / RECORDS_NAME).stat().st_size < (
            share + 0.1
        ) * whole.expert_bytes_total * 1.1
    assert found == expected
    assert set(os.listdir(tmp_path)) == {"1", "2", "3"}


def test_a_share_of_a_share_is_refused(indexed: Path, tmp_path: Path) -> None:
    shard(indexed, Share(1, 2), tmp_path / "half")
    with pytest.raises(errors.ManifestInvalid, match="is share 1 of 2 itself: make shares of"):
        shard(tmp_path / "half", Share(1, 2), tmp_path / "quarter")
    assert not (tmp_path / "quarter").exists()


def test_more_shares_than_experts_are_refused(indexed: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ManifestInvalid, match="17 shares of 16 experts a layer"):
        shard(indexed, Share(1, 17), tmp_path / "part")


def test_the_store_itself_is_not_overwritten(packed: Path) -> None:
    with pytest.raises(errors.ManifestInvalid, match="holds the store itself"):
        shard(packed, Share(1, 2), packed, overwrite=True)
    with pytest.raises(errors.ManifestInvalid, match="holds the store itself"):
        shard(packed, Share(1, 2), packed.parent, overwrite=True)


def test_a_folder_that_exists_is_replaced_when_asked(packed: Path, tmp_path: Path) -> None:
    shard(packed, Share(1, 2), tmp_path / "part")
    with pytest.raises(errors.ManifestInvalid, match="or --overwrite"):
        shard(packed, Share(2, 2), tmp_path / "part")
    shard(packed, Share(2, 2), tmp_path / "part", overwrite=True)
    assert Manifest.load(tmp_path / "part").share == Share(2, 2)
    assert verify(tmp_path / "part") == []


def test_interrupted_it_resumes_and_another_share_starts_over(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    for owner in (1, 2):
        shard(packed, Share(owner, 2), tmp_path / f"expected{owner}")
    monkeypatch.setattr(record_file, "_SYNC_BYTES", 1)
    with pytest.raises(KeyboardInterrupt):
        shard(packed, Share(1, 2), tmp_path / "part", report=interrupt)
    assert not (tmp_path / "part").exists()
    journal = tmp_path / "part.partial" / JOURNAL_NAME
    assert len(journal.read_text().splitlines()) > 5
    copied: list[str] = []
    real = module._Files.copy

    def copy(self: object, descriptor: int, start: int, **what: object) -> int:
        copied.append(str(what["record"]))
        return real(self, descriptor, start, **what)  # type: ignore[arg-type]

    monkeypatch.setattr(module._Files, "copy", copy)
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "part.partial", kept)
    made = shard(packed, Share(1, 2), tmp_path / "part")
    assert 0 < len(copied) < 0.6 * len(made.records), "it started over"
    shutil.copytree(kept, tmp_path / "other.partial")
    shard(packed, Share(2, 2), tmp_path / "other")
    for name, owner in (("part", 1), ("other", 2)):
        found, expected = content(tmp_path / name), content(tmp_path / f"expected{owner}")
        assert found.keys() == expected.keys()
        assert all(found[one] == expected[one] for one in found if one != MANIFEST_NAME)
        assert not (tmp_path / f"{name}.partial").exists()


def test_a_disk_that_is_too_small_is_named_with_what_is_needed(
    packed: Path, small_disk: SmallDisk
) -> None:
    needed = 0
    with pytest.raises(
        errors.ManifestInvalid, match=r"share 1 of 2 needs ([\d,]+) bytes"
    ) as caught:
        shard(packed, Share(1, 2), small_disk.path / "part")
    assert not any(small_disk.path.iterdir())
    needed = int(str(caught.value).split()[5].replace(",", ""))
    small_disk.resize(needed + 400_000)
    shard(packed, Share(1, 2), small_disk.path / "part")
    assert verify(small_disk.path / "part") == []


def test_a_damaged_record_is_named_and_copied_once_it_is_whole(
    packed: Path, tmp_path: Path
) -> None:
    shutil.copytree(packed, tmp_path / "store")
    manifest = Manifest.load(tmp_path / "store")
    key, record = list(manifest.records.items())[-1]
    share = next(Share(n, 2) for n in (1, 2) if key.expert in Share(n, 2).experts(manifest.spec))
    damaged = tmp_path / "store" / RECORDS_NAME
    flip(damaged, record.extents[0].offset_bytes + 7)
    with pytest.raises(errors.ManifestInvalid, match=f"expert {key} is damaged: run `flashmoe"):
        shard(tmp_path / "store", share, tmp_path / "part")
    assert not (tmp_path / "part").exists()
    flip(damaged, record.extents[0].offset_bytes + 7)
    dense = manifest.spec.dense[0]
    flip(tmp_path / "store" / DENSE_NAME, dense.offset_bytes)
    with pytest.raises(errors.ManifestInvalid, match=f"{dense.name} is damaged"):
        shard(tmp_path / "store", share, tmp_path / "part")
    flip(tmp_path / "store" / DENSE_NAME, dense.offset_bytes)
    shard(tmp_path / "store", share, tmp_path / "part")
    assert verify(tmp_path / "part") == []


def test_a_checkpoint_that_changed_is_not_copied(checkpoint: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, root)
    index(root, tmp_path / "store")
    os.utime(root / "model.safetensors", ns=(1, 1))
    with pytest.raises(errors.SourceChanged, match="touched after it was indexed"):
        shard(tmp_path / "store", Share(1, 2), tmp_path / "part")


def test_what_lies_beside_the_weights_comes_along(checkpoint: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, root)
    (root / "README.md").write_text("what its makers say\n")
    index(root, tmp_path / "store")
    shutil.move(root, tmp_path / "moved")
    shard(tmp_path / "store", Share(1, 2), tmp_path / "part", source=tmp_path / "moved")
    assert (tmp_path / "part" / "README.md").read_text() == "what its makers say\n"
    config = json.loads((tmp_path / "part" / "config.json").read_text())
    assert config == json.loads((checkpoint / "config.json").read_text())
    document = json.loads((tmp_path / "part" / MANIFEST_NAME).read_text())
    assert document["version"] == 4 and document["share"] == [1, 2, 1]
