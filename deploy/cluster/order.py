"""What a box has to run: made of cluster.toml, sent to the box, written down there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from deploy.cluster.box import AnyBox, MainBox, ShadowBox, WorkerBox
from deploy.cluster.config import ClusterConfig

SETTINGS_NAME, WORKERS_NAME = "box.toml", "workers.toml"


@dataclass(frozen=True)
class Order:
    """Paths may begin with `~`: the home of the box.

    verb: `serve`, `worker` or `shadow`
    settings: as flashmoe.toml has them
    workers, shadow: of a main node, as its workers file has them
    """

    name: str
    verb: str
    run_dir: str
    settings: dict[str, Any]
    workers: tuple[dict[str, Any], ...] = ()
    shadow: dict[str, Any] | None = None

    @classmethod
    def of(cls, config: ClusterConfig, box: AnyBox) -> Order:
        """Raises ConfigInvalid for memory that is none."""
        if not isinstance(box, MainBox):
            verb = "shadow" if isinstance(box, ShadowBox) else "worker"
            settings = {"serve": _served(config, box) | {"listen": box.address}}
            tables = {verb: _protected(config, box, "tls"), **_lending_table(config, box)}
            if config.lender_of(box) is not None and config.certs is not None:
                tables[verb] |= _protected(config, box, "store_tls")
            return cls(box.name, verb, str(box.folder), _merged(settings, tables, box.tables))
        served = _served(config, box) | {
            "http": box.http,
            "api_key_file": _text(box.api_key_file),
            "quality": box.quality,
            "policy": box.policy,
        }
        node = {"workers_file": str(box.folder / WORKERS_NAME)}
        if config.certs is not None:
            node |= _protected(config, box, "worker_tls")
        tables = {"compute_node": node, **_lending_table(config, box)}
        settings = _merged({"serve": served}, tables, box.tables)
        workers = workers_of(config.workers)
        shadow = {"address": config.shadow.address} if config.shadow is not None else None
        return cls(box.name, "serve", str(box.folder), settings, workers, shadow)

    def settings_text(self) -> str:
        """On the box: the file that its stack is started with."""
        return tomli_w.dumps(_at_home(self.settings))

    def workers_text(self) -> str:
        """On the main box: the file from which its node takes its workers and its shadow."""
        shadow = {"shadow": self.shadow} if self.shadow is not None else {}
        return tomli_w.dumps({"worker": list(self.workers), **shadow})


def workers_of(boxes: Sequence[WorkerBox]) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"address": box.address, "joules": box.joules, "latency": box.latency} for box in boxes
    )


def _served(config: ClusterConfig, box: AnyBox) -> dict[str, Any]:
    store: dict[str, Any] = {"model": str(box.model or config.model), "source": _text(box.source)}
    if (lender := config.lender_of(box)) is not None:
        store = {"store": lender.at(lender.lend_port)}
    return store | {
        "lend": box.at(box.lend_port) if config.lends(box) else None,
        "memory": str(config.stack_memory_bytes(box)),
        "experts_memory": box.experts_memory,
        "run_dir": str(box.folder),
    }


def _lending_table(config: ClusterConfig, box: AnyBox) -> dict[str, dict[str, Any]]:
    return {"expert_store": _protected(config, box, "tls")} if config.lends(box) else {}


def _protected(config: ClusterConfig, box: AnyBox, key: str) -> dict[str, Any]:
    """What a daemon shows other boxes, and accepts of them."""
    if config.certs is None:
        return {"insecure": config.insecure}
    files = {"cert": f"{box.name}.pem", "key": f"{box.name}.key", "ca": "ca.pem"}
    return {key: {role: str(config.certs / name) for role, name in files.items()}}


def _merged(
    settings: dict[str, Any], tables: dict[str, dict[str, Any]], own: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The file's own tables win."""
    names = tables.keys() | own.keys()
    merged = {name: tables.get(name, {}) | own.get(name, {}) for name in sorted(names)}
    given = {key: value for key, value in settings["serve"].items() if value is not None}
    return {"serve": given, **merged}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _at_home(value: Any) -> Any:
    """With every `~/` written out."""
    if isinstance(value, dict):
        return {key: _at_home(one) for key, one in value.items()}
    if isinstance(value, str) and value.startswith("~/"):
        return str(Path(value).expanduser())
    return value
