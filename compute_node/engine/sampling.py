"""From logits to the next token: transformers' own logits processors, and a seeded draw."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from compute_node.client.sampling_options import SamplingOptions
from proto import errors


class Sampler:
    """Draws one sequence's tokens."""

    def __init__(self, options: SamplingOptions) -> None:
        self._greedy = options.temperature == 0.0
        self._processors = _processors(options)
        self._generator = torch.Generator()
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed)

    def copy(self) -> Sampler:
        """Draws what this one will draw from the same logits."""
        copy = object.__new__(Sampler)
        copy.__dict__.update(self.__dict__)
        copy._generator = self._generator.clone_state()
        return copy

    def draw(self, token_ids: list[int], logits: Tensor) -> int:
        """token_ids: so far, prompt included. logits: [1, V], of the last position.

        Raises InvalidRequest for options that make them infinite.
        """
        scores = logits.to(torch.float32)
        if self._processors:
            scores = self._processors(torch.tensor([token_ids]), scores)
            if not scores.max().isfinite():
                raise errors.InvalidRequest(
                    "this model's logits become infinite by this temperature or "
                    "repetition_penalty: choose values nearer to 1"
                )
        if self._greedy:
            return int(scores.argmax(dim=-1))
        probabilities = torch.softmax(scores, dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def _processors(options: SamplingOptions) -> Any:
    chosen: list[Any] = []
    if options.repetition_penalty not in (0.0, 1.0):
        chosen.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.temperature not in (0.0, 1.0):
        chosen.append(TemperatureLogitsWarper(options.temperature))
    if options.temperature and options.top_k:
        chosen.append(TopKLogitsWarper(options.top_k))
    if options.temperature and 0.0 < options.top_p < 1.0:
        chosen.append(TopPLogitsWarper(options.top_p))
    return LogitsProcessorList(chosen)
