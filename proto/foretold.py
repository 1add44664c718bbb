"""What predictors said of a decode step's routers before they were reached, as arrays: recorded for
a client. L counts MoE layers, N layers ahead, E experts a layer; proto/access.proto says how they
travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from proto import access_pb2 as pb
from proto import errors

_MOST_AHEAD = 64


@dataclass(frozen=True)
class Foretold:
    """Of one decode step.

    scores: by predictor, [L, N, E], of each layer what was said 1 to N layers before it, as the
            predictor said it; NaN: nothing
    truth:  [L, E], what its router gave then; NaN: it cannot be asked
    inputs: [L + 1, D], what a router map reads: the token's embedding, then of each layer the
            residual stream with what its resident experts add, each over its root mean square;
            NaN: not recognised; None: not asked for
    """

    scores: Mapping[str, NDArray[np.float16]]
    truth: NDArray[np.float16]
    inputs: NDArray[np.float16] | None = None

    def to_pb(self) -> pb.Foretold:
        inputs = self.inputs
        return pb.Foretold(
            num_layers=self.truth.shape[0],
            num_experts=self.truth.shape[1],
            num_ahead=max((each.shape[1] for each in self.scores.values()), default=0),
            predictors=[
                pb.Foretelling(predictor=name, scores=_bytes(each))
                for name, each in self.scores.items()
            ],
            truth=_bytes(self.truth),
            inputs=None if inputs is None else _bytes(inputs),
            hidden_size=0 if inputs is None else inputs.shape[1],
        )

    @classmethod
    def from_pb(cls, message: pb.Foretold) -> Self:
        """Raises MessageInvalid when the arrays have not the shape they are said to have."""
        layers, experts, ahead = message.num_layers, message.num_experts, message.num_ahead
        if ahead > _MOST_AHEAD:
            raise errors.MessageInvalid(f"field 'num_ahead' is {ahead}, more than {_MOST_AHEAD}")
        inputs = None
        if message.HasField("inputs"):
            inputs = _array("inputs", message.inputs, (layers + 1, message.hidden_size))
        return cls(
            {
                each.predictor: _array("scores", each.scores, (layers, ahead, experts))
                for each in message.predictors
            },
            _array("truth", message.truth, (layers, experts)),
            inputs,
        )


def _bytes(array: NDArray[np.float16]) -> bytes:
    return array.astype("<f2", copy=False).tobytes()


def _array(name: str, data: bytes, shape: tuple[int, ...]) -> Any:
    size = 2
    for length in shape:
        size *= length
    if len(data) != size:
        raise errors.MessageInvalid(f"field {name!r} has {len(data)} bytes, not {shape}")
    return np.frombuffer(data, "<f2").reshape(shape)
