"""What a caller may do to the logits, by OpenAI's formulas.

Planted faults seen red: penalties over the prompt too, a presence penalty for each occurrence,
min_p left out, a bias that is added in place, a generator that another process begins anew.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compute_node.client.sampling_options import SamplingOptions
from compute_node.engine.log_probs import log_probs_of
from compute_node.engine.sampling import Sampler
from compute_node.predict.drawing import Drawing
from proto import errors


def drawn(logits: list[float], so_far: list[int], num_prompt: int, **options: object) -> int:
    sampler = Sampler(SamplingOptions(**options), num_prompt)  # type: ignore[arg-type]
    return sampler.draw(so_far, torch.tensor([logits]))


def test_penalties_count_the_answer_and_not_the_prompt() -> None:
    logits = [3.0, 2.5, 0.0]
    assert drawn(logits, [0, 0, 0], 3, frequency_penalty=2.0) == 0
    assert drawn(logits, [0, 0, 0], 2, frequency_penalty=0.4) == 0
    assert drawn(logits, [0, 0, 0], 1, frequency_penalty=0.4) == 1
    assert drawn(logits, [0, 0, 0], 1, presence_penalty=0.4) == 0
    assert drawn(logits, [0, 0, 0], 1, presence_penalty=0.6) == 1
    assert drawn(logits, [2, 2], 0, frequency_penalty=-2.0) == 2


def test_a_bias_chooses_and_bans() -> None:
    assert drawn([3.0, 2.5, 0.0], [], 0, logit_bias={2: 100.0}) == 2
    assert drawn([3.0, 2.5, 0.0], [], 0, logit_bias={0: -100.0}) == 1
    assert drawn([3.0, 2.5, 0.0], [2], 0, logit_bias={2: 4.0}, frequency_penalty=1.5) == 0


def test_min_p_leaves_what_is_likely_enough() -> None:
    seeds = range(200)
    found = {drawn([2.0, 1.9, 0.0], [], 0, temperature=1.0, min_p=0.5, seed=s) for s in seeds}
    assert found == {0, 1}
    found = {drawn([2.0, 1.9, 0.0], [], 0, temperature=1.0, seed=s) for s in seeds}
    assert found == {0, 1, 2}


def test_another_process_draws_the_same() -> None:
    logits = torch.zeros(1, 50)
    sampler = Sampler(SamplingOptions(temperature=1.0, presence_penalty=2.0), num_prompt=1)
    tokens = [4]
    for _ in range(5):
        drawing = Drawing.from_pb(sampler.drawing().to_pb())
        other = Sampler.resumed(drawing)
        following = sampler.draw(tokens, logits)
        assert other.draw(tokens, logits) == following
        tokens.append(following)
    greedy = Sampler.resumed(Sampler(SamplingOptions()).drawing())
    assert greedy.draw(tokens, torch.tensor([[0.0, 2.0, 1.0]])) == 1
    with pytest.raises(errors.InvalidRequest, match="generator"):
        Sampler.resumed(replace(drawing, state=b"no state"))


def test_logits_are_left_as_they_were() -> None:
    """Red for a bias that is added in place: the logits are read again for log probabilities."""
    logits = torch.tensor([[3.0, 2.5, 0.0]])
    options = SamplingOptions(logit_bias={2: 9.0}, frequency_penalty=1.0)
    Sampler(options).draw([1], logits)
    assert logits.tolist() == [[3.0, 2.5, 0.0]]


def test_log_probs_are_of_the_raw_distribution() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    found = log_probs_of(None, [0], logits, 0, 2)
    expected = torch.log_softmax(logits[0].double(), 0).tolist()
    assert found.drawn.log_prob == expected[0]
    assert [(one.token_id, one.log_prob) for one in found.likeliest] == [
        (1, expected[1]),
        (2, expected[2]),
    ]
