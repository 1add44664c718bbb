"""Settings of the scheduler: the [scheduler] table of flashmoe.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from proto.process import daemon
from proto.redis_schema import IMPORTANCE_POLICY, PolicySetting
from proto.rpc import Listen, TlsFiles

HalfLives = Annotated[tuple[PositiveFloat, ...], Field(min_length=1, max_length=16)]
MoeLayers = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1, max_length=4096)]

FORECASTER_NAME = "forecaster.safetensors"  # beside a store's manifest


class SchedulerConfig(BaseModel):
    """Frozen and strict: an unknown key stops the daemon and is named.

    moe_layers:  model layer numbers, ascending; evidence and advice number them 0..L-1
    consumer:    our name in the consumer group; a restart under the same name resumes its entries
    policy:      in charge of every node; auto, what the shadows of each one say
    niceness:    how far we stand back when a node computes tokens on the same cores
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    redis_url: str
    fingerprint: Annotated[str, Field(min_length=1, max_length=256)]
    moe_layers: MoeLayers
    num_experts: Annotated[int, Field(ge=1, le=65_536)]

    horizon_steps: Annotated[int, Field(ge=1, le=256)] = 8
    half_lives_tokens: HalfLives = (2.0, 8.0, 16.0, 64.0)
    learn_rows_per_step: Annotated[int, Field(ge=1, le=4096)] = 32
    recall_steps: Annotated[int, Field(ge=64, le=65_536)] = 8192
    max_nodes: PositiveInt = 8

    policy: PolicySetting = "auto"
    shadow_half_life_steps: PositiveInt = 256
    decayed_half_life_tokens: PositiveFloat = 16.0
    importance: bool = False
    forecaster_path: Path | None = None

    advice_lifetime_s: PositiveFloat = 5.0
    advice_min_interval_s: NonNegativeFloat = 0.0

    consumer: Annotated[str, Field(min_length=1, max_length=256)] = "scheduler"
    read_block_s: Annotated[float, Field(ge=0.01, le=10)] = 0.5
    claim_idle_s: PositiveFloat = 60.0
    learn_backlog_events: PositiveInt = 32
    reconnect_max_s: PositiveFloat = 2.0

    snapshot_path: Path | None = None
    snapshot_interval_s: PositiveFloat = 30.0

    tls: TlsFiles | None = None
    insecure: bool = False
    stop_grace_s: NonNegativeFloat = 5.0
    niceness: Annotated[int, Field(ge=0, le=19)] = 10
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    metrics_port_file: Path | None = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, url: str) -> str:
        if not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must begin with redis://, rediss:// or unix://")
        return url

    @field_validator("moe_layers")
    @classmethod
    def _check_moe_layers(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if list(layers) != sorted(set(layers)):
            raise ValueError("must be ascending, each layer once")
        return layers

    @property
    def runs_importance(self) -> bool:
        """Whether it is among the policies that may be in charge: nodes send gates then."""
        return self.importance or self.policy == IMPORTANCE_POLICY

    @property
    def listen(self) -> Listen:
        return Listen(self.address, self.tls, self.insecure)

    @property
    def num_layers(self) -> int:
        return len(self.moe_layers)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ConfigInvalid naming the file, the key, what is wrong with it and the remedy."""
        return daemon.load_table(path, "scheduler", cls)
