"""A store with a second, smaller record of every expert, written by the real encoders.

Planted faults seen red: variants written with the exact encoder, a journal that does not tell
variants apart, small records verified as exact ones, one small record a slot.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from expert_store.manifest.manifest import Manifest
from expert_store.offline.pack import pack
from expert_store.offline.record_file import JOURNAL_NAME, RECORDS_NAME
from expert_store.offline.verify import verify
from proto import shm
from proto.expert import ExpertKey, RecordKey
from tests.expert_store.raw_session import Lock, Wire
from tests.expert_store.stores import flip
from tests.local_store import local_store


@pytest.fixture(scope="module")
def both(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exact and int4. Read it only."""
    folder = tmp_path_factory.mktemp("both") / "store"
    pack(checkpoint, folder, variants=("int4",))
    return folder


@pytest.fixture(scope="module")
def int4(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int4") / "store"
    pack(checkpoint, folder, weight_format="int4")
    return folder


def content(store_dir: Path, key: RecordKey) -> bytes:
    """Of the record in the file."""
    data = (store_dir / RECORDS_NAME).read_bytes()
    extents = Manifest.load(store_dir).record(key).extents
    return b"".join(data[e.offset_bytes : e.offset_bytes + e.length_bytes] for e in extents)


def test_each_variant_is_what_a_store_of_its_own_would_hold(
    both: Path, packed: Path, int4: Path
) -> None:
    manifest, exact, small = map(Manifest.load, (both, packed, int4))
    assert len(manifest.records) == 2 * manifest.spec.num_experts_total
    assert manifest.spec.layouts == exact.spec.layouts
    assert manifest.spec.variant("int4").layouts == small.spec.layouts
    assert manifest.spec.variant("int4").weight_format == small.spec.weight_format
    for key in exact.records:
        assert content(both, key) == content(packed, key)
        assert content(both, RecordKey(key.expert, "int4")) == content(int4, key)
    assert len({each.spec.fingerprint for each in (manifest, exact, small)}) == 3
    assert verify(both) == []


def test_a_damaged_record_is_named_with_its_variant(both: Path, tmp_path: Path) -> None:
    shutil.copytree(both, tmp_path / "store")
    key = RecordKey(ExpertKey(1, 2), "int4")
    extent = Manifest.load(both).record(key).extents[-1]
    flip(tmp_path / "store" / RECORDS_NAME, extent.offset_bytes + extent.length_bytes - 1)
    assert [damage.name for damage in verify(tmp_path / "store")] == [str(key)] == ["L01E002/int4"]


def test_a_killed_run_goes_on_only_with_the_same_variants(
    both: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other variants put the records of this one elsewhere."""
    target, partial = tmp_path / "store", tmp_path / "store.partial"

    def killed(manifest: Manifest, store_dir: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Manifest, "write", killed)
        pack(checkpoint, target, variants=("int8", "int4"))
    assert (partial / JOURNAL_NAME).exists()
    pack(checkpoint, target, variants=("int4",))
    assert (target / RECORDS_NAME).read_bytes() == (both / RECORDS_NAME).read_bytes()


def test_both_are_lent_and_small_ones_share_a_slot(both: Path, run_dir: Path) -> None:
    classes = Manifest.load(both).size_classes
    num_parts = classes.num_parts["int4"]
    assert num_parts > 1
    small = [RecordKey(ExpertKey(0, expert), "int4") for expert in range(num_parts)]
    wanted = [RecordKey.exact(0, 0), *small]
    with (
        local_store(both, run_dir, 4, read_depth=2) as address,
        Wire(address, run_dir) as wire,
        Lock(run_dir / "sessions", "both.lock") as lock,
    ):
        assert wire.describe().lease_bytes == classes.lease_bytes
        session, opened = wire.open_shared(lock, quota_slots=2)
        with session:
            leases = session.exchange(wanted)
            data = memoryview(Path(opened.segment_path).read_bytes())
            layout, _ = shm.read_header(data, len(data))
            for key, lease in zip(wanted, leases, strict=True):
                start = layout.slot_offset_bytes(lease.slot) + lease.start_bytes
                expected = content(both, key)
                assert bytes(data[start : start + len(expected)]) == expected
            assert len({lease.slot for lease in leases[1:]}) == 1 < num_parts
        lock.let_go()
        wire.until_idle()
