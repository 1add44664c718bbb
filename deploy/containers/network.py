"""Who of other boxes reaches the containers, and whom they reach."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Any

from compute_node.gateway.host_port import HostPort
from deploy.settings import ServeSettings
from proto import errors
from proto.rpc import Listen, check_exposure, is_loopback

INSIDE = "0.0.0.0"  # where a helper listens in its container; only the engine publishes it
_LAST_PORT = 65535
_TLS_KEYS = {"compute_node": "worker_tls", "worker": "tls", "shadow": "tls"}  # by table


def published(settings: ServeSettings) -> str:
    """The ports at which main nodes reach a worker or shadow, as compose has them: the same outside
    and inside; of a worker also the next, for short messages. Raises ConfigInvalid for one that
    the engine cannot publish, and for one beyond this host with neither TLS nor `insecure`.
    """
    try:
        where = HostPort.parse(settings.listen)
        ip_address(where.host)
    except ValueError:
        raise errors.ConfigInvalid(
            f"--listen {settings.listen}: an engine publishes on an IP address of this box: write "
            "for example 10.0.0.2:9400"
        ) from None
    if where.port == 0:
        raise errors.ConfigInvalid("--listen: main nodes need to know the port: name one")
    table: dict[str, Any] = getattr(settings, settings.role)
    if "tls" not in table:
        check_exposure(Listen(str(where), None, bool(table.get("insecure"))))
    ports = str(where.port)
    if settings.role == "worker":
        if where.port == _LAST_PORT:
            raise errors.ConfigInvalid("--listen: a worker needs the next port, too: name another")
        ports = f"{where.port}-{where.port + 1}"
    return f"{str(where).rpartition(':')[0]}:{ports}:{ports}"


def listening_inside(settings: ServeSettings) -> dict[str, Any]:
    """Settings of a worker or shadow whose port is published. On loopback alone the publishing is
    the fence, and the daemon need not have one.
    """
    table: dict[str, Any] = getattr(settings, settings.role)
    is_fenced = is_loopback(settings.listen) and "tls" not in table
    port = HostPort.parse(settings.listen).port
    return {
        "listen": f"{INSIDE}:{port}",
        **({"direct_port": port + 1} if settings.role == "worker" else {}),
        **({"insecure": True} if is_fenced else {}),
    }


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
        if address.startswith("unix") or is_loopback(address):
            raise errors.ConfigInvalid(
                f"{address} is not seen by containers, whose loopback is their own: name an "
                "address of the box"
            )
    return "bridge" if boxes else "none"


def certificates(tables: dict[str, dict[str, Any]], inside: Path) -> dict[str, Path]:
    """Have the tables name the files of TLS where the containers find them. A daemon that runs
    takes files that were renewed.

    inside: the run folder, in there
    Returns which file goes to which name in the run folder.
    """
    found = {}
    for name, key in _TLS_KEYS.items():
        for role, path in tables.get(name, {}).get(key, {}).items():
            file = f"tls.{role}.pem"
            found[file] = Path(path)
            tables[name][key] = tables[name][key] | {role: str(inside / file)}
    return found
