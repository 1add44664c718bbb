"""Settings of the expert store: the [expert_store] table of flashmoe.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from proto.process import daemon
from proto.rpc import Listen, TlsFiles


class ExpertStoreConfig(BaseModel):
    """Frozen and strict: an unknown key stops the daemon and is named."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    store_dir: Path
    source_root: Path | None = None
    segment_path: Path
    session_dir: Path
    num_slots: PositiveInt
    read_depth: Annotated[int, Field(ge=1, le=64)] = 4
    spare_slots: PositiveInt | None = None
    listen: str | None = None
    lent_slots: NonNegativeInt = 0
    max_queued_reads: PositiveInt = 4096
    piece_bytes: Annotated[int, Field(ge=4096, multiple_of=4096)] = 2 * 1024 * 1024
    direct_io: bool = True
    resident_list: Path | None = None
    lock_poll_s: PositiveFloat = 0.1
    restart_wait_s: PositiveFloat = 60.0
    stop_grace_s: PositiveFloat = 5.0
    tls: TlsFiles | None = None
    insecure: bool = False
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    metrics_port_file: Path | None = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @model_validator(mode="after")
    def _leave_slots_to_lend(self) -> Self:
        if self.max_leased <= 0:
            spare = self.num_slots - self.max_leased
            raise ValueError(f"num_slots must exceed the spare slots ({spare})")
        if self.lent_slots > self.max_leased:
            raise ValueError(f"lent_slots are of the {self.max_leased} that nodes may hold")
        return self

    @property
    def max_leased(self) -> int:
        """Slots that quotas may cover; the others are spare."""
        return self.num_slots - (self.spare_slots or self.read_depth)

    @property
    def local_socket_path(self) -> Path:
        """Beside the nodes' locks: a process that can hold one can connect."""
        return self.session_dir / "exchange.sock"

    @property
    def faces(self) -> list[Listen]:
        """Where it serves. With `listen`, tls and insecure are of that alone."""
        if self.listen is None:
            return [Listen(self.address, self.tls, self.insecure)]
        return [Listen(self.address), Listen(self.listen, self.tls, self.insecure)]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ConfigInvalid naming the file, the key and what is wrong with it."""
        return daemon.load_table(path, "expert_store", cls)
