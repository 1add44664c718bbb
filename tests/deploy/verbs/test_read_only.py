"""Stores and folders that cannot be written: what would be lost is refused before the work begins,
and a store is served from where it is.

Planted faults seen red: the place looked at after the training, a forecaster outside the store that
nobody is told of, the card's file not looked at.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import scheduler.lab.calibration
from deploy.lab import plot
from deploy.plan.parts import forecaster_room
from deploy.settings import ServeSettings
from deploy.verbs.calibrate import calibrate
from expert_store.offline.card import CARD_NAME, check_card
from expert_store.offline.pack import pack
from proto import errors
from scheduler.config import FORECASTER_NAME
from tests.places import not_root, read_only
from tests.stack import FLASHMOE, MODEL, served


def test_calibrate_refuses_before_it_trains(
    tiny_store: Path, cut_trace: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red: minutes of training, then a traceback."""

    def train(*_: object) -> None:
        raise AssertionError("it trained")

    monkeypatch.setattr(scheduler.lab.calibration, "calibrate", train)
    store = Path(shutil.copytree(tiny_store, run_dir / "store"))
    copied = shutil.copyfile(cut_trace, run_dir / "trace.npz")
    for path, mode in ((run_dir, 0o755), (store, 0o555), (copied, 0o644)):
        path.chmod(mode)
    with (
        not_root(),
        pytest.raises(errors.InvalidRequest, match=r"Permission denied\): give --out FILE, and"),
    ):
        calibrate(store, trace=copied)
    with pytest.raises(errors.InvalidRequest, match=r"No such file.*give --out FILE"):
        calibrate(store, trace=copied, out=run_dir / "no" / "such")
    assert not (store / FORECASTER_NAME).exists()


def test_a_forecaster_may_lie_outside_the_store(tmp_path: Path) -> None:
    """The flag wins over the store's own, and is not forgotten in the memory plan."""
    settings, store, outside = ServeSettings(), tmp_path / "store", tmp_path / "forecaster"
    store.mkdir()
    assert settings.forecaster(store) is None and forecaster_room(None) == 0
    (store / FORECASTER_NAME).write_bytes(bytes(10))
    assert settings.forecaster(store) == store / FORECASTER_NAME
    named = settings.with_forecaster(outside)
    with pytest.raises(errors.ConfigInvalid, match="calibrate --out"):
        named.forecaster(store)
    outside.write_bytes(bytes(100))
    assert named.forecaster(store) == outside
    assert forecaster_room(named.forecaster(store)) == 300


def test_a_card_or_picture_that_cannot_be_written_is_refused_at_once(run_dir: Path) -> None:
    card, picture = run_dir / CARD_NAME, run_dir / "hits.png"
    card.write_text("# A store\n\n## Perplexity\n\nNot measured yet.\n")
    picture.mkdir()
    check_card(run_dir)
    with pytest.raises(errors.InvalidRequest, match="give another --plot"):
        plot.check_writable(picture)
    run_dir.chmod(0o555)
    card.chmod(0o444)
    with not_root():
        with pytest.raises(errors.ManifestInvalid, match="leave --card out"):
            check_card(run_dir)
        with pytest.raises(errors.InvalidRequest, match="give another --plot"):
            plot.check_writable(run_dir / "other.png")
    run_dir.chmod(0o755)


@pytest.mark.system
def test_a_copied_store_on_a_read_only_disk_is_served_with_a_forecaster_from_elsewhere(
    cut_trace: Path, tmp_path: Path, run_dir: Path
) -> None:
    """Red: it was "touched", verify could not heal it, and what was learned had no place."""
    pack(MODEL, tmp_path / "packed")
    store = tmp_path / "copy"
    shutil.copytree(tmp_path / "packed", store, copy_function=shutil.copyfile)
    forecaster = tmp_path / "forecaster.safetensors"
    calibrate(store, trace=cut_trace, max_updates=5, out=forecaster)
    assert [path.name for path in store.iterdir() if path.name == FORECASTER_NAME] == []
    flags = ["--forecaster", str(forecaster), "--policy", "learned"]
    with served(store, run_dir, *flags, command=read_only(store, *FLASHMOE)) as stack:
        assert len(stack.generate(max_tokens=16)) == 16
        assert "learned" in stack.status()["scheduler"]["nodes"]["node0"]["policies"]
