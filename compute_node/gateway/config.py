"""Settings of the gateway: the [gateway] table of flashmoe.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from compute_node.gateway.host_port import HostPort
from compute_node.live.look import NODE, SCHEDULER, STORE
from proto.process import daemon
from proto.rpc import Listen, TlsFiles, is_loopback


class GatewayConfig(BaseModel):
    """Frozen and strict: an unknown key stops the daemon and is named."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    http: str = "127.0.0.1:8000"
    node_address: str
    node_tls: TlsFiles | None = None
    store_address: str | None = None
    scheduler_address: str | None = None
    run_dir: Path | None = None
    model: str | None = None
    api_key_file: Path | None = None
    cors_origins: tuple[str, ...] = ()
    max_connections: PositiveInt = 512
    max_body_bytes: PositiveInt = 4 * 1024 * 1024
    header_timeout_s: PositiveFloat = 10.0
    body_timeout_s: PositiveFloat = 30.0
    send_timeout_s: PositiveFloat = 30.0
    keep_alive_s: PositiveFloat = 30.0
    stop_grace_s: PositiveFloat = 20.0
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    metrics_port_file: Path | None = None
    http_port_file: Path | None = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @model_validator(mode="after")
    def _need_a_key_beyond_loopback(self) -> Self:
        where = str(HostPort.parse(self.http))
        if self.api_key_file is None and not is_loopback(where):
            raise ValueError(f"http {where} is reachable from other hosts: give --api-key-file")
        return self

    @property
    def listen(self) -> Listen:
        """Of its gRPC face: health and counters."""
        return Listen(self.address)

    @property
    def daemons(self) -> dict[str, str]:
        """Addresses of those whose figures the live page shows, by name."""
        found = {
            NODE: self.node_address,
            STORE: self.store_address,
            SCHEDULER: self.scheduler_address,
        }
        return {name: address for name, address in found.items() if address is not None}

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ConfigInvalid naming the file, the key and what is wrong with it."""
        return daemon.load_table(path, "gateway", cls)
