"""Fields that OpenAI's two ways to generate share, and what becomes of unknown ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from compute_node.gateway.refusals import Refused

# They change nothing of the answer, or nothing that the model here has a say in.
_HARMLESS = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
_DEFAULT_TEMPERATURE = 1.0
_SEEDS = 2**64


class StreamOptions(BaseModel):
    """As OpenAI has it."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Generated(BaseModel):
    """What both say of how to generate. Beside OpenAI's: top_k, min_p, repetition_penalty, quality,
    ignore_eos.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    quality: str | None = None
    ignore_eos: bool | None = None

    @property
    def wants_usage(self) -> bool:
        """At the end of a stream."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Raises Refused for what would be answered otherwise than it was asked."""
        for name, value in (self.model_extra or {}).items():
            if name not in _HARMLESS and value not in (None, [], {}, False):
                raise Refused(f"{name} is not supported: leave it out", param=name)
        if self.n not in (None, 1):
            raise Refused(f"n is {self.n}: one answer is given, send the request again", param="n")
        if self.stream_options is not None and not self.stream:
            raise Refused("stream_options are for stream = true", param="stream_options")

    def sampling(self) -> dict[str, Any]:
        """As the node's client takes it."""
        given: Mapping[str, Any] = {
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "logit_bias": self.logit_bias,
            "quality": self.quality,
            "ignore_eos": self.ignore_eos,
            "stop": self.stop,
            "seed": None if self.seed is None else self.seed % _SEEDS,  # theirs may be negative
        }
        temperature = _DEFAULT_TEMPERATURE if self.temperature is None else self.temperature
        found = {name: value for name, value in given.items() if value is not None}
        return {"temperature": temperature, "fits_context": True, **found}
