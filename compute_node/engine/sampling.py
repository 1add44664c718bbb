"""From logits to the next token: transformers' own logits processors, and a seeded draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from compute_node.client.sampling_options import SamplingOptions
from compute_node.predict.drawing import Drawing
from proto import errors


class _Biases:
    """Adds to the logits of the tokens that a caller named."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._ids = torch.tensor([list(biases)])
        self._biases = torch.tensor([list(biases.values())], dtype=torch.float32)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: [1, T]; scores: [1, V]"""
        return scores.scatter_add(1, self._ids, self._biases)


class _Penalties:
    """Takes off the logits of tokens that the answer has already: OpenAI's formula."""

    def __init__(self, frequency: float, presence: float, num_prompt: int) -> None:
        self._frequency, self._presence, self._num_prompt = frequency, presence, num_prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: [1, T], prompt included; scores: [1, V]"""
        used = input_ids[0, self._num_prompt :]
        counts = torch.bincount(used, minlength=scores.shape[-1])
        return scores - self._frequency * counts - self._presence * (counts > 0)


class Sampler:
    """Draws one sequence's tokens. num_prompt: how many of them it was given"""

    def __init__(self, options: SamplingOptions, num_prompt: int = 0) -> None:
        self._options, self._num_prompt = options, num_prompt
        self._greedy = options.temperature == 0.0
        self._processors = _processors(options, num_prompt)
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

    def drawing(self) -> Drawing:
        """For another process."""
        state = b"" if self._greedy else self._generator.get_state().numpy().tobytes()
        return Drawing(self._options, self._num_prompt, state)

    @classmethod
    def resumed(cls, drawing: Drawing) -> Sampler:
        """Draws what the other will draw. Raises InvalidRequest for what is no state of one."""
        sampler = cls(drawing.options, drawing.num_prompt)
        if not sampler._greedy:
            state = torch.frombuffer(bytearray(drawing.state or b"?"), dtype=torch.uint8)
            try:
                sampler._generator.set_state(state)
            except RuntimeError as error:
                raise errors.InvalidRequest(f"no generator has this state: {error}") from error
        return sampler

    def draw(self, token_ids: list[int], logits: Tensor, allowed: Tensor | None = None) -> int:
        """token_ids: so far, prompt included. logits: [1, V], of the last position. allowed: [V]
        bool, the others are never drawn, whatever the options; None: all

        Raises InvalidRequest for options that make them infinite.
        """
        scores = logits.to(torch.float32)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
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


def _processors(options: SamplingOptions, num_prompt: int) -> Any:
    chosen: list[Any] = []
    if options.logit_bias:
        chosen.append(_Biases(options.logit_bias))
    if options.frequency_penalty or options.presence_penalty:
        chosen.append(_Penalties(options.frequency_penalty, options.presence_penalty, num_prompt))
    if options.repetition_penalty not in (0.0, 1.0):
        chosen.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.temperature not in (0.0, 1.0):
        chosen.append(TemperatureLogitsWarper(options.temperature))
    if options.temperature and options.top_k:
        chosen.append(TopKLogitsWarper(options.top_k))
    if options.temperature and 0.0 < options.top_p < 1.0:
        chosen.append(TopPLogitsWarper(options.top_p))
    if options.temperature and options.min_p:
        chosen.append(MinPLogitsWarper(options.min_p))
    return LogitsProcessorList(chosen)
