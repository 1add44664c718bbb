"""Settings of the compute node: the [compute_node] table of flashmoe.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from proto import errors
from proto.process import daemon
from proto.quality import EXACT_NAME, Budget
from proto.redis_schema import IMPORTANCE_POLICY, PolicySetting
from proto.rpc import Listen, TlsFiles

ROUTER_MAP_NAME = "router_map.safetensors"  # beside a store's manifest

RunAheadSetting = Literal["auto", "always", "off"]
"""auto: where waits are long enough; always: at every layer, for tests."""


class ComputingConfig(BaseModel):
    """What every daemon has that computes with a store's experts. Frozen and strict: an unknown key
    stops the daemon and is named.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    node: str
    store_address: str
    session_dir: Path
    model_dir: Path | None = None
    slots: PositiveInt
    deadline_s: PositiveFloat = 30.0
    threads: Annotated[int, Field(ge=0)] = 0
    verdicts_path: Path | None = None
    native: Literal["auto", "portable", "off"] = "auto"
    tls: TlsFiles | None = None
    insecure: bool = False
    stop_grace_s: PositiveFloat = 5.0
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    metrics_port_file: Path | None = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


class ComputeNodeConfig(ComputingConfig):
    """Of the main daemon."""

    node: str = "node0"
    store_tls: TlsFiles | None = None
    transport: Literal["shared_memory", "chunks"] = "shared_memory"
    scope: Literal["layer", "pool"] = "pool"
    policy: PolicySetting = "auto"
    half_life_tokens: PositiveFloat = 16.0
    importance: bool = False
    workers: tuple[str, ...] = ()
    workers_file: Path | None = None
    worker_tls: TlsFiles | None = None
    placement: Literal["shares", "cheapest", "rotation"] = "shares"
    groups: Annotated[int, Field(ge=0)] = 0
    shadow_address: str | None = None
    shadow_align_tokens: Annotated[int, Field(ge=0)] = 1
    redis_url: str | None = None
    advice_poll_s: PositiveFloat = 0.02
    forecaster_path: Path | None = None
    router_map_path: Path | None = None
    quality: str = EXACT_NAME
    quality_path: Path | None = None
    max_context_tokens: PositiveInt = 2048
    prefill_chunk_tokens: PositiveInt = 512
    prefetch_depth: Annotated[int, Field(ge=0, le=8)] = 3
    run_ahead: RunAheadSetting = "auto"
    max_queued_requests: PositiveInt = 16
    max_sequences: PositiveInt = 8
    kv_bytes: Annotated[int, Field(ge=0)] | None = None
    kv_bytes_per_token: Annotated[int, Field(ge=0)] | None = None
    kv_bytes_fixed: Annotated[int, Field(ge=0)] | None = None
    kept_states: Annotated[int, Field(ge=0)] = 4
    max_stall_s: PositiveFloat = 0.5
    max_turn_tokens: PositiveInt = 256
    stop_grace_s: PositiveFloat = 20.0

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must begin with redis://, rediss:// or unix://")
        return url

    @field_validator("quality")
    @classmethod
    def _check_quality(cls, quality: str) -> str:
        try:
            return str(Budget.parse(quality))
        except errors.InvalidRequest as error:
            raise ValueError(str(error)) from None

    @property
    def weighs(self) -> bool:
        """Whether routers' gates of all experts are kept, and sent with evidence."""
        return self.importance or self.policy == IMPORTANCE_POLICY

    @property
    def listen(self) -> Listen:
        return Listen(self.address, self.tls, self.insecure)

    @property
    def has_boxes(self) -> bool:
        """Whether others may compute experts for it."""
        return bool(self.workers) or self.workers_file is not None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ConfigInvalid naming the file, the key and what is wrong with it."""
        return daemon.load_table(path, "compute_node", cls)


class HelperConfig(ComputingConfig):
    """Of a box that helps main nodes on others: what a worker's and a shadow's have in common."""

    listen: str | None = None

    @property
    def faces(self) -> list[Listen]:
        """Where it serves: for its own box, and for main nodes on others."""
        faces = [Listen(self.address)]
        if self.listen is not None:
            faces.append(Listen(self.listen, self.tls, self.insecure))
        return faces
