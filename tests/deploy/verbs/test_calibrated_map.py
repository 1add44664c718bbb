"""The router map as part of a calibration: what becomes of the forecaster, and of an older map.

Planted faults seen red: the map trained before the forecaster is published, a full disk that ends
the recording, lessons left on it.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

import scheduler.lab.calibration
from compute_node.client.result import Phase, Result
from deploy.lab.calibrated_map import MapCalibration
from deploy.lab.map_lessons import MapLessons
from deploy.verbs.calibrate import calibrate
from proto import errors
from scheduler.config import FORECASTER_NAME
from tests.deploy.lab.test_map_training import Spec, step


class Trained:
    """A forecaster that is one at once."""

    def save(self, path: Path) -> None:
        path.write_text("a forecaster")


def generated(steps: int = 10) -> Result:
    phase = Phase(0, 0, 0, 0, 0.0, 0.0)
    made = [step() for _ in range(steps)]
    return Result("", [], [], "length", 0.0, 0.0, 0.0, phase, phase, steps=made)


def calibration(folder: Path, said: list[str]) -> MapCalibration:
    return MapCalibration(Spec, folder, said.append)  # type: ignore[arg-type]


def test_the_forecaster_is_kept_whatever_becomes_of_the_map(
    tiny_store: Path, cut_trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("the map")

    monkeypatch.setattr(scheduler.lab.calibration, "calibrate", lambda *_: Trained())
    monkeypatch.setattr(MapCalibration, "train", fails)
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    with pytest.raises(RuntimeError, match="the map"):
        calibrate(store, trace=cut_trace)
    assert {path.name for path in store.iterdir()} == {"manifest.json", FORECASTER_NAME}


def test_a_full_disk_costs_the_map_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generations go on and their steps are kept; what was spooled makes room at once."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with calibration(tmp_path, []) as routers:
        routers.take(generated())
        monkeypatch.setattr(MapLessons, "add", full)
        for _ in range(2):
            kept = routers.take(generated())
            assert len(kept.steps) == 10 and kept.steps[0].foretold is None
        assert not list(tmp_path.iterdir())
        with pytest.raises(errors.InvalidRequest) as caught:
            routers.train()
    assert str(caught.value) == (
        f"no router map: {tmp_path} cannot take what belongs to it ([Errno 28] No space left on "
        "device): make room there and calibrate again; the forecaster is written"
    )
