"""A store that starts again has in memory what it had, and is put off by no list.

Planted faults seen red: a list of another model used, no refill at start.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from compute_node.store.borrow import StoreClient
from expert_store.store import resident_list
from expert_store.store.resident_list import Keeper, load, save
from proto.expert import RecordKey
from tests.expert_store.conftest import SmallDisk
from tests.expert_store.raw_session import Wire, until
from tests.expert_store.stores import FILE_NAME, KEYS, expert_range, flip
from tests.local_store import local_store


def test_a_list_comes_back_in_its_order(tmp_path: Path) -> None:
    save(tmp_path / "list.json", "model", KEYS[3::-1])
    assert load(tmp_path / "list.json", "model") == KEYS[3::-1]
    assert [path.name for path in tmp_path.iterdir()] == ["list.json"]


@pytest.mark.parametrize(
    "text",
    ["", "no json", "[]", "{}", '{"fingerprint": "other", "experts": []}']
    + [f'{{"fingerprint": "model", "experts": {experts}}}' for experts in ("7", "[7]", "[[1]]")],
)
def test_a_list_that_does_not_fit_is_named_and_not_used(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "list.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert load(path, "model") == []
    assert "not used" in caplog.text
    assert load(tmp_path / "none.json", "model") == []


def test_a_restart_is_warm(store_dir: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when one of the experts was damaged meanwhile."""
    monkeypatch.setattr(resident_list, "_INTERVAL_S", 0.01)
    path = run_dir / "resident.json"
    with local_store(store_dir, run_dir, 8, resident_list=path) as address:
        client = StoreClient(address, "node", 4, run_dir / "sessions", deadline_s=10)
        client.open()
        client.exchange([], KEYS[:3])
        until(lambda: path.exists() and len(load(path, client.describe().spec.fingerprint)) == 3)
        client.close()
    flip(store_dir / FILE_NAME, expert_range(KEYS[1])[5])
    with (
        local_store(store_dir, run_dir, 8, resident_list=path) as address,
        Wire(address, run_dir) as wire,
    ):
        wire.until_stats(lambda stats: stats.refill_reads == 2 and not stats.slots_filling)
        assert wire.resident() == {KEYS[0], KEYS[2]}
        assert list(wire.stats().quarantined) == [str(KEYS[1])]


class Wanting:
    """As much of a store as the list needs. `manifest.spec.fingerprint` is its own."""

    fingerprint = "model"

    def __init__(self) -> None:
        self.manifest = self.spec = self

    def wanted(self) -> list[RecordKey]:
        return KEYS[:3]


def test_a_full_disk_is_told_once_and_leaves_the_list_as_it_was(
    small_disk: SmallDisk, caplog: pytest.LogCaptureFixture
) -> None:
    """Red before: a warning every five seconds, and list.new beside the list."""
    path = small_disk.path / "list.json"
    keeper = Keeper(Wanting(), path)  # type: ignore[arg-type]
    keeper.save_current()
    ballast = small_disk.path / "ballast"
    ballast.write_bytes(b"x" * small_disk.free_bytes)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            keeper.save_current()
        assert [record.message for record in caplog.records] == ["list of residents not written"]
        assert load(path, "model") == KEYS[:3]
        assert {file.name for file in small_disk.path.iterdir()} == {"list.json", "ballast"}
        ballast.unlink()
        keeper.save_current()
    assert caplog.records[-1].message == "list of residents written again"
    assert caplog.records[-1].failures == 3  # type: ignore[attr-defined]
