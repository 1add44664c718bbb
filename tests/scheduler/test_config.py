from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w
from pydantic import ValidationError

from proto import errors
from scheduler.config import SchedulerConfig

GOOD = {
    "address": "unix:s.sock",
    "redis_url": "unix:///r.sock",
    "fingerprint": "f",
    "moe_layers": [1, 2, 4],
    "num_experts": 8,
}


def load(tmp_path: Path, table: dict[str, object]) -> SchedulerConfig:
    path = tmp_path / "flashmoe.toml"
    path.write_text(tomli_w.dumps({"scheduler": table, "expert_store": {"other": 1}}))
    return SchedulerConfig.load(path)


def test_reads_its_own_table(tmp_path: Path) -> None:
    config = load(tmp_path, {**GOOD, "horizon_steps": 8})
    assert config.moe_layers == (1, 2, 4)
    assert (config.num_layers, config.horizon_steps, config.advice_lifetime_s) == (3, 8, 5.0)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ({"horizon_stepps": 8}, "unknown key 'horizon_stepps': remove it"),
        ({"horizon_steps": 0}, "key 'horizon_steps' is 0"),
        ({"redis_url": "http://x"}, "key 'redis_url'"),
        ({"moe_layers": [4, 1]}, "key 'moe_layers'"),
        ({"half_lives_tokens": [8, -1]}, "key 'half_lives_tokens.1' is -1"),
        ({"log_level": "LOUD"}, "key 'log_level'"),
        ({"metrics_port": 70_000}, "key 'metrics_port'"),
    ],
)
def test_a_fault_is_named(tmp_path: Path, fault: dict[str, object], named: str) -> None:
    """Red when extra keys are ignored, or when a range is not checked."""
    with pytest.raises(errors.ConfigInvalid) as caught:
        load(tmp_path, {**GOOD, **fault})
    assert named in str(caught.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    """Red when an unset fingerprint gets a default."""
    table = {key: value for key, value in GOOD.items() if key != "fingerprint"}
    with pytest.raises(errors.ConfigInvalid, match="'fingerprint' is missing: add it"):
        load(tmp_path, table)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", r"has no table \[scheduler\]: add one"),
        ("scheduler = 3", r"has no table \[scheduler\]: add one"),
        ("[scheduler", "cannot read"),
    ],
)
def test_a_file_without_the_table_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    """Red when a parse error or a missing table leaves as another exception."""
    path = tmp_path / "flashmoe.toml"
    path.write_text(text)
    with pytest.raises(errors.ConfigInvalid, match=reason):
        SchedulerConfig.load(path)


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigInvalid, match="cannot read"):
        SchedulerConfig.load(tmp_path / "absent.toml")


def test_is_frozen(tmp_path: Path) -> None:
    """Red without frozen=True."""
    config = load(tmp_path, dict(GOOD))
    with pytest.raises(ValidationError):
        config.num_experts = 9  # type: ignore[misc]
