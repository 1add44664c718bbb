"""Which box of a cluster this machine is."""

from __future__ import annotations

import socket

from deploy.cluster.box import AnyBox
from deploy.cluster.config import ClusterConfig
from proto import errors


def here(config: ClusterConfig) -> AnyBox:
    """The first box whose address this machine has. Raises ConfigInvalid when none is."""
    for box in config.boxes:
        if _is_ours(box.host):
            return box
    hosts = ", ".join(box.host for box in config.boxes)
    raise errors.ConfigInvalid(f"this machine is none of the boxes {hosts}: run it on one of them")


def _is_ours(host: str) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True
