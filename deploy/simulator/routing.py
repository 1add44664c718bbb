"""Which experts tokens use: as recorded, or drawn from a model that was fitted to recordings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deploy.simulator.geometry import Geometry
from scheduler.simulate.trace import AccessTrace

_ANSWER_TOKENS = 350  # of the recording that the constants are fitted to, on average


@dataclass(frozen=True)
class Scores:
    """A router's score of an expert is a sum of normal parts: `popular` is the expert's for good,
    `topical` an answer's, `lasting` fades by half in half_life_tokens, and a part of weight 1 is
    new with each token. The top_k best are used. Layers and experts are independent.

    The fields are the parts' standard deviations.
    """

    popular: float
    topical: float
    lasting: float
    half_life_tokens: float

    def draw(self, shape: tuple[int, int], top_k: int, num_tokens: int, seed: int) -> AccessTrace:
        """A trace of answers of 350 tokens. shape: layers, experts"""
        draws = np.random.default_rng(seed)
        fade = 0.5 ** (1 / self.half_life_tokens)
        popular, lasting = (draws.standard_normal(shape) for _ in range(2))
        ids = np.empty((num_tokens, shape[0], top_k), np.uint16)
        for token in range(num_tokens):
            if token % _ANSWER_TOKENS == 0:
                topical = draws.standard_normal(shape)
            lasting = fade * lasting + np.sqrt(1 - fade**2) * draws.standard_normal(shape)
            scores = self.popular * popular + self.topical * topical + self.lasting * lasting
            scores += draws.standard_normal(shape)
            ids[token] = np.argpartition(-scores, top_k, axis=1)[:, :top_k]
        starts = np.arange(0, num_tokens, _ANSWER_TOKENS)
        return AccessTrace(
            "drawn",
            ids,
            np.append(starts, num_tokens).astype(np.int64),
            shape[1],
            np.zeros(ids.shape, np.float16),
        )


# `python -m tests.bench.fit_routing`
FITTED = Scores(0.64, 1.03, 0.65, 2.7)


def matches(trace: AccessTrace, geometry: Geometry) -> bool:
    """Whether it may be a recording of such a model."""
    return (trace.shape, trace.top_k) == (geometry.shape, geometry.top_k)
