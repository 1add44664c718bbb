"""What predictors would have said of each layer of a decode step, for a client's recording."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compute_node.predict.mapped_routers import model_input
from compute_node.predict.next_router import NextRouters
from compute_node.predict.predictor import EMBEDDING, Predictor, Seen
from proto import errors
from proto.expert import ModelSpec
from proto.foretold import Foretold

LAYERS_AHEAD = 3
_LIMIT = float(np.finfo(np.float16).max)


@torch.inference_mode()
def foretold(
    spec: ModelSpec,
    predictors: Sequence[Predictor],
    routers: NextRouters,
    seen: Mapping[int, Seen],
    keeps_inputs: bool,
) -> Foretold:
    """seen: by layer, of one sequence's step, `EMBEDDING` too; what its resident experts add is
    known of each layer that had any.

    Raises InvalidRequest when no layer's router can be asked.
    """
    layers, known = spec.moe_layers, [seen[layer] for layer in (EMBEDDING, *spec.moe_layers)]
    if not any(layer in routers.routers for layer in layers):
        raise errors.InvalidRequest(
            f"{spec.model_type} chooses experts by routers that cannot be asked ahead: record "
            "without predictions"
        )
    truth = _filled(
        (len(layers), spec.num_experts),
        lambda at: (
            routers.truth(layers[at[0]], seen[layers[at[0]]].hidden)[0]
            if layers[at[0]] in routers.routers
            else None
        ),
    )
    return Foretold(
        {each.name: _said(spec, each, known) for each in predictors},
        truth,
        _inputs(known) if keeps_inputs else None,
    )


def _said(spec: ModelSpec, predictor: Predictor, known: Sequence[Seen]) -> NDArray[np.float16]:
    """[L, N, E]. known: [L + 1], of the embedding and of each layer"""

    def said(at: tuple[int, ...]) -> Tensor | None:
        place, number = at
        if (source := place - number) < 0:
            return None
        asked, layer = known[source], spec.moe_layers[place]
        return predictor.scores(asked, layer)[0] if predictor.knows(asked, layer) else None

    return _filled((len(spec.moe_layers), LAYERS_AHEAD, spec.num_experts), said)


def _inputs(known: Sequence[Seen]) -> NDArray[np.float16]:
    """[L + 1, D]"""
    rows = [model_input(each) for each in known]
    shape = len(known), known[0].hidden.shape[-1]
    return _filled(shape, lambda at: None if (row := rows[at[0]]) is None else row[0])


def _filled(
    shape: tuple[int, ...], row: Callable[[tuple[int, ...]], Tensor | None]
) -> NDArray[np.float16]:
    """Rows of the last axis; NaN where there is none. What half precision cannot hold becomes its
    largest number.
    """
    filled = np.full(shape, np.nan, np.float16)
    for at in np.ndindex(shape[:-1]):
        if (values := row(at)) is not None:
            filled[at] = values.float().clamp(-_LIMIT, _LIMIT).numpy()
    return filled
