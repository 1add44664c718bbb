"""How tokens are drawn, as a request says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Self

from proto import compute_node_pb2 as pb
from proto import errors

MAX_UINT32, MAX_UINT64 = 2**32 - 1, 2**64 - 1  # what the wire's numbers hold
_MAX_PENALTY, _MAX_BIAS, _MAX_BIASES = 2.0, 100.0, 1024  # as OpenAI has them; more is a mistake


@dataclass(frozen=True)
class SamplingOptions:
    """temperature 0 is greedy. top_k 0, top_p 0 or 1, repetition_penalty 0 or 1, min_p 0 are off.
    seed None: random.

    frequency_penalty: taken off a token's logit as often as the answer has the token
    presence_penalty: taken off once for each token that the answer has
    logit_bias: by token id, added before everything else
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    repetition_penalty: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_p: float = 0.0

    def __post_init__(self) -> None:
        """Raises InvalidRequest naming the option."""
        if not 0 <= self.top_k <= MAX_UINT32:
            raise errors.InvalidRequest(f"top_k {self.top_k} is not within 0 and {MAX_UINT32}")
        if self.seed is not None and not 0 <= self.seed <= MAX_UINT64:
            raise errors.InvalidRequest(f"seed {self.seed} is not within 0 and {MAX_UINT64}")
        if self.temperature != 0.0 and not 0.001 <= self.temperature <= 100.0:
            raise errors.InvalidRequest(
                f"temperature {self.temperature} is neither 0 nor within 0.001 and 100"
            )
        if not 0.0 <= self.top_p <= 1.0:
            raise errors.InvalidRequest(f"top_p {self.top_p} is not within 0 and 1")
        if self.repetition_penalty != 0.0 and not 0.01 <= self.repetition_penalty <= 100.0:
            raise errors.InvalidRequest(
                f"repetition_penalty {self.repetition_penalty} is neither 0 nor within 0.01 and 100"
            )
        if not 0.0 <= self.min_p <= 1.0:
            raise errors.InvalidRequest(f"min_p {self.min_p} is not within 0 and 1")
        _check_penalty("frequency_penalty", self.frequency_penalty)
        _check_penalty("presence_penalty", self.presence_penalty)
        _check_biases(self.logit_bias)

    def to_pb(self) -> pb.Sampling:
        return pb.Sampling(**asdict(self))

    @classmethod
    def from_pb(cls, sampling: pb.Sampling) -> Self:
        """Raises InvalidRequest naming the option."""
        return cls(
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.repetition_penalty,
            sampling.seed if sampling.HasField("seed") else None,
            sampling.frequency_penalty,
            sampling.presence_penalty,
            dict(sampling.logit_bias),
            sampling.min_p,
        )


def _check_penalty(name: str, penalty: float) -> None:
    if not -_MAX_PENALTY <= penalty <= _MAX_PENALTY:
        raise errors.InvalidRequest(
            f"{name} {penalty} is not within -{_MAX_PENALTY:g} and {_MAX_PENALTY:g}"
        )


def _check_biases(biases: Mapping[int, float]) -> None:
    if len(biases) > _MAX_BIASES:
        raise errors.InvalidRequest(
            f"logit_bias names {len(biases)} tokens: give at most {_MAX_BIASES}"
        )
    for token_id, bias in biases.items():
        if not 0 <= token_id <= MAX_UINT32:
            raise errors.InvalidRequest(f"logit_bias: {token_id} is no token id")
        if not -_MAX_BIAS <= bias <= _MAX_BIAS:
            raise errors.InvalidRequest(
                f"logit_bias of token {token_id} is {bias}, not within -{_MAX_BIAS:g} and "
                f"{_MAX_BIAS:g}"
            )
