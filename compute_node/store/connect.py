"""The store of a daemon's settings, on this host or on another."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from compute_node.store.borrow import StoreClient
from proto.rpc import TlsFiles


class BorrowerSettings(Protocol):
    """transport: shared_memory, or chunks from another host"""

    @property
    def store_address(self) -> str: ...

    @property
    def store_tls(self) -> TlsFiles | None: ...

    @property
    def transport(self) -> str: ...

    @property
    def node(self) -> str: ...

    @property
    def slots(self) -> int: ...

    @property
    def session_dir(self) -> Path: ...

    @property
    def deadline_s(self) -> float: ...


def connect_store(config: BorrowerSettings) -> StoreClient:
    """Asks nothing of it yet. The caller closes it."""
    shared = config.transport == "shared_memory"
    return StoreClient(
        config.store_address,
        config.node,
        config.slots,
        config.session_dir if shared else None,
        config.deadline_s,
        config.store_tls,
    )
