"""Tables of the daemons: what a setting may name, and what only the launcher derives.

Planted fault seen red: settings compared with tables in which the files are named already.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.settings import ServeSettings
from deploy.stack.stack_plan import StackPlan
from deploy.stack.tables import compose
from proto import errors


def tables(settings: ServeSettings) -> dict[str, dict[str, object]]:
    plan = StackPlan.of(settings)
    return compose(plan.run_dir, plan.settings, plan.store_dir, plan.manifest, plan.memory)


@pytest.fixture
def settings(tiny_store: Path, tmp_path: Path) -> ServeSettings:
    return ServeSettings(
        model=tiny_store, run_dir=tmp_path / "run", source=tmp_path, experts_memory="100%"
    )


def test_files_that_settings_name_are_used(settings: ServeSettings, tmp_path: Path) -> None:
    """Whether a flag names them or the file does."""
    forecaster, router_map = tmp_path / "forecaster", tmp_path / "map"
    for path in (forecaster, router_map):
        path.write_bytes(b"")
    named = settings.with_forecaster(forecaster).model_copy(
        update={
            "compute_node": {"router_map_path": str(router_map)},
            "expert_store": {"source_root": str(tmp_path / "elsewhere")},
        }
    )
    found = tables(named)
    assert found["scheduler"]["forecaster_path"] == str(forecaster)
    assert found["compute_node"]["forecaster_path"] == str(forecaster)
    assert found["compute_node"]["router_map_path"] == str(router_map)
    assert found["expert_store"]["source_root"] == str(tmp_path / "elsewhere")
    assert tables(settings)["expert_store"]["source_root"] == str(tmp_path)
    assert "forecaster_path" not in tables(settings)["scheduler"]


@pytest.mark.parametrize(
    ("role", "name", "key"),
    [
        ("main", "compute_node", "slots"),
        ("main", "expert_store", "store_dir"),
        ("worker", "worker", "slots"),
        ("shadow", "shadow", "store_address"),
    ],
)
def test_what_the_launcher_derives_is_not_set(
    settings: ServeSettings, role: str, name: str, key: str
) -> None:
    if role != "main":
        settings = settings.of_helper(role).model_copy(update={"listen": "127.0.0.1:9777"})
    with pytest.raises(errors.ConfigInvalid, match=rf"table \[{name}\] sets '{key}', which the"):
        tables(settings.model_copy(update={name: {key: 1}}))
