"""deploy/flashmoe.toml against the models it documents."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from compute_node.config import ComputeNodeConfig
from compute_node.gateway.config import GatewayConfig
from compute_node.shadow.config import ShadowConfig
from compute_node.worker.config import WorkerConfig
from deploy.settings import ServeSettings
from expert_store.config import ExpertStoreConfig
from scheduler.config import SchedulerConfig

REFERENCE = Path(__file__).parents[2] / "deploy" / "flashmoe.toml"
DAEMONS: dict[str, type[BaseModel]] = {
    "expert_store": ExpertStoreConfig,
    "compute_node": ComputeNodeConfig,
    "scheduler": SchedulerConfig,
    "gateway": GatewayConfig,
    "worker": WorkerConfig,
    "shadow": ShadowConfig,
}
MODELS: dict[str, type[BaseModel]] = {"serve": ServeSettings, **DAEMONS}
NOT_EXPANDED = "run_dir"  # its default begins with the user's home folder
CHOSEN_BY_LAUNCHER = "prefill_chunk_tokens"  # for the model; setting it would be a choice

TABLE = re.compile(r"\[(\w+)\]")
ENTRY = re.compile(r"(?P<off># )?(?P<key>\w+) = (?P<value>.+?)  # (?P<unit>.+) \| default: (.+)")


@dataclass(frozen=True)
class Entry:
    """One documented key. about: the comment above it."""

    table: str
    key: str
    value: str
    unit: str
    default: str
    is_set: bool
    about: str

    @property
    def field(self) -> Any:
        return MODELS[self.table].model_fields[self.key]


def read_entries(text: str) -> list[Entry]:
    entries, table, about = [], "", ""
    for line in text.splitlines():
        if found := TABLE.fullmatch(line):
            table = found[1]
        elif found := ENTRY.fullmatch(line):
            off, key, value, unit, default = found.groups()
            entries.append(Entry(table, key, value, unit, default, off is None, about))
            about = ""
        else:
            about = f"{about} {line.removeprefix('# ')}" if line else ""
    return entries


ENTRIES = read_entries(REFERENCE.read_text())
each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.table}.{e.key}")


@pytest.mark.parametrize("table", MODELS)
def test_every_setting_is_documented_once_and_nothing_else_is(table: str) -> None:
    """Red when a key is deleted or misspelt, and for a new field of a model."""
    documented = [entry.key for entry in ENTRIES if entry.table == table]
    fields = [name for name in MODELS[table].model_fields if name not in DAEMONS]
    assert sorted(documented) == sorted(fields)


@each_entry
def test_documented_default_is_the_models(entry: Entry) -> None:
    """Red for `default: 5` at read_depth, and for the same change in the model."""
    default = entry.field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        assert entry.default == "required"
    elif default is None:
        assert entry.default == "none"
    elif entry.key == NOT_EXPANDED:
        assert Path(entry.default).expanduser() == default
    else:
        assert entry.default.lower() == _as_toml(default)


@each_entry
def test_what_is_set_is_the_default(entry: Entry) -> None:
    """Red for `read_depth = 8` with `default: 4`, and when a key with a default is commented
    out.
    """
    has_default = entry.default not in ("required", "none")
    has_default &= entry.key not in (NOT_EXPANDED, CHOSEN_BY_LAUNCHER)
    assert entry.is_set == has_default
    if entry.is_set:
        value = tomllib.loads(f"value = {entry.value}")["value"]
        expected = entry.field.default
        assert value == (list(expected) if isinstance(expected, tuple) else expected)
        assert type(value) is type(expected) or isinstance(expected, tuple)


@each_entry
def test_unit_and_reason_are_given(entry: Entry) -> None:
    """Red when `Why:` and what follows is deleted, and for ms at a key that ends in _s."""
    what, _, why = entry.about.partition(" Why: ")
    assert len(what) > 5
    assert len(why) > 5
    assert entry.unit
    if entry.key.endswith("_s"):
        assert entry.unit.startswith("seconds")
    if entry.key.endswith("_tokens"):
        assert entry.unit.startswith("tokens")


def test_the_launcher_reads_the_file_as_it_is() -> None:
    """Red when `run_dir = "~/..."` is set (not expanded), and for `read_dept`."""
    settings = ServeSettings.load(REFERENCE)
    without_tables = settings.model_dump(exclude=set(DAEMONS))
    assert without_tables == ServeSettings().model_dump(exclude=set(DAEMONS))
    for table, model in DAEMONS.items():
        assert set(getattr(settings, table)) <= set(model.model_fields)


@pytest.mark.parametrize("table", DAEMONS)
def test_the_daemons_accept_every_example(table: str, tmp_path: Path) -> None:
    """Red for `transport = "shared"`, and for `crt` in a TLS example."""
    entries = [entry for entry in ENTRIES if entry.table == table]
    lines = [f"[{table}]", *(f"{entry.key} = {entry.value}" for entry in entries)]
    (tmp_path / "flashmoe.toml").write_text("\n".join(lines))
    config = DAEMONS[table].load(tmp_path / "flashmoe.toml")  # type: ignore[attr-defined]
    assert config.model_fields_set == set(DAEMONS[table].model_fields)


def _as_toml(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value).lower()
