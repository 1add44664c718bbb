"""Who of other boxes reaches the containers, and whom they reach."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from compute_node.gateway.host_port import HostPort
from deploy.settings import ServeSettings
from proto import errors
from proto.rpc import Listen, check_exposure, is_loopback

INSIDE = "0.0.0.0"  # where a helper listens in its container; only the engine publishes it
_LAST_PORT = 65535
_TLS_KEYS = (  # table and key
    ("compute_node", "worker_tls"),
    ("expert_store", "tls"),
    ("worker", "tls"),
    ("worker", "store_tls"),
    ("shadow", "tls"),
)


def published(settings: ServeSettings) -> str:
    """The ports at which main nodes reach a worker or shadow, as compose has them: the same outside
    and inside; of a worker also the next, for short messages. Raises ConfigInvalid for one that
    the engine cannot publish, and for one beyond this host with neither TLS nor `insecure`.
    """
    where = _published("--listen", settings.listen, getattr(settings, settings.role))
    if settings.role != "worker":
        return _ports(where, 1)
    if where.port == _LAST_PORT:
        raise errors.ConfigInvalid("--listen: a worker needs the next port, too: name another")
    return _ports(where, 2)


def lent(settings: ServeSettings) -> str | None:
    """The port at which other boxes borrow experts, as `published`; None: they do not. Raises
    ConfigInvalid.
    """
    if settings.lends_at is None:
        return None
    return _ports(_published("--lend", settings.lends_at, settings.expert_store), 1)


def _published(flag: str, address: str, table: Mapping[str, Any]) -> HostPort:
    """table: of the daemon that listens there. Raises ConfigInvalid."""
    try:
        where = HostPort.parse(address)
        ip_address(where.host)
    except ValueError:
        raise errors.ConfigInvalid(
            f"{flag} {address}: an engine publishes on an IP address of this box: write for "
            "example 10.0.0.2:9400"
        ) from None
    if where.port == 0:
        raise errors.ConfigInvalid(f"{flag}: other boxes need to know the port: name one")
    if "tls" not in table:
        check_exposure(Listen(str(where), None, bool(table.get("insecure"))))
    return where


def _ports(where: HostPort, number: int) -> str:
    """The same outside and inside."""
    last = f"-{where.port + number - 1}" if number > 1 else ""
    ports = f"{where.port}{last}"
    return f"{str(where).rpartition(':')[0]}:{ports}:{ports}"


def listening_inside(settings: ServeSettings) -> dict[str, Any]:
    """Settings of a worker or shadow whose port is published."""
    found = _inside(settings.listen, getattr(settings, settings.role))
    if settings.role == "worker":
        found["direct_port"] = HostPort.parse(settings.listen).port + 1
    return found


def lending_inside(settings: ServeSettings) -> dict[str, Any]:
    """Settings of a store whose port is published, if it is."""
    if settings.lends_at is None:
        return {}
    return _inside(settings.lends_at, settings.expert_store)


def _inside(address: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """Where a daemon listens in its container. On loopback alone the publishing is the fence, and
    the daemon need not have one.
    """
    is_fenced = is_loopback(address) and "tls" not in table
    found: dict[str, Any] = {"listen": f"{INSIDE}:{HostPort.parse(address).port}"}
    return found | ({"insecure": True} if is_fenced else {})


def check_found(address: str) -> None:
    """Raises ConfigInvalid for an address that a container does not find."""
    if address.startswith("unix") or is_loopback(address):
        raise errors.ConfigInvalid(
            f"{address} is not seen by containers, whose loopback is their own: name an address of "
            "the box"
        )


def node_network(settings: ServeSettings) -> str:
    """The compose network mode of a main node. Raises ConfigInvalid for boxes that it would not
    find from inside a container.
    """
    if "workers_file" in settings.compute_node:
        raise errors.ConfigInvalid(
            "table [compute_node]: workers_file is not seen by containers: name workers by --worker"
        )
    shadow = settings.shadow_address or settings.compute_node.get("shadow_address")
    boxes = [*settings.workers, *filter(None, [shadow])]
    for address in boxes:
        check_found(address)
    return "bridge" if boxes else "none"


def certificates(tables: dict[str, dict[str, Any]], inside: Path) -> dict[str, Path]:
    """Have the tables name the files of TLS where the containers find them. A daemon that runs
    takes files that were renewed.

    inside: the run folder, in there
    Returns which file goes to which name in the run folder.
    """
    found = {}
    for name, key in _TLS_KEYS:
        for role, path in tables.get(name, {}).get(key, {}).items():
            file = f"{name}.{key}.{role}.pem"
            found[file] = Path(path)
            tables[name][key] = tables[name][key] | {role: str(inside / file)}
    return found
