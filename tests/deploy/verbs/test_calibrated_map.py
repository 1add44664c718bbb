"""The router map as part of a calibration: what becomes of the forecaster, and of an older map.

Planted faults seen red: the map trained before the forecaster is published, a full disk that ends
the recording, lessons left on it, an older map that stays.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

import scheduler.lab.calibration
from compute_node.client.result import Phase, Result
from compute_node.config import ROUTER_MAP_NAME
from deploy.lab.calibrated_map import MapCalibration
from deploy.lab.map_lessons import MapLessons
from deploy.settings import ServeSettings, router_map_beside
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
    return MapCalibration(Spec, folder / ROUTER_MAP_NAME, said.append)  # type: ignore[arg-type]


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
        f"no new router map: {tmp_path} cannot take what belongs to it ([Errno 28] No space left "
        "on device): make room there and calibrate again; the forecaster is written"
    )


@pytest.mark.parametrize(
    ("steps", "why"),
    [(0, "a trace does not hold what it learns from"), (10, "fewer than 64 steps")],
)
def test_an_older_map_does_not_outlive_a_calibration_without_one(
    tmp_path: Path, steps: int, why: str
) -> None:
    older, said = tmp_path / ROUTER_MAP_NAME, list[str]()
    older.write_text("an older map")
    with calibration(tmp_path, said) as routers:
        routers.take(generated(steps))
        routers.train()
    assert why in said[0]
    assert said[1] == f"{older}: removed, it is of an earlier calibration"
    assert not older.exists()


def test_a_map_is_named_after_its_forecaster(tmp_path: Path) -> None:
    """Red when two forecasters of one folder share one map."""
    assert router_map_beside(tmp_path / FORECASTER_NAME) == tmp_path / ROUTER_MAP_NAME
    for name in ("a.safetensors", "b"):
        found = router_map_beside(tmp_path / name)
        assert found.name == f"{name[0]}.{ROUTER_MAP_NAME}"
        assert ServeSettings().with_forecaster(tmp_path / name).router_map(tmp_path) is None
        found.touch()
        assert ServeSettings().with_forecaster(tmp_path / name).router_map(tmp_path) == found


def test_a_stack_that_calibrates_uses_nothing_calibrated(tmp_path: Path) -> None:
    """Red when only what lies beside the manifest is left out, or only what a table names."""
    for name in (FORECASTER_NAME, ROUTER_MAP_NAME, "named"):
        (tmp_path / name).touch()
    named, other = str(tmp_path / "named"), {"half_life_tokens": 8.0}
    for settings in (
        ServeSettings(),
        ServeSettings(
            compute_node={"forecaster_path": named, "router_map_path": named, **other},
            scheduler={"forecaster_path": named},
        ),
    ):
        assert settings.forecaster(tmp_path) and settings.router_map(tmp_path)
        left = settings.uncalibrated().with_flags(model=tmp_path)
        assert left.forecaster(tmp_path) is None and left.router_map(tmp_path) is None
        assert left.scheduler == {} and left.compute_node in ({}, other)
