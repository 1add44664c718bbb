"""What a predictor was lately wrong by is added to what it says.

Planted faults seen red: the error of one way added to another, an error that is not finite learned,
what a pass that was given up had said compared with another batch, the error subtracted.
"""

from __future__ import annotations

import torch

from compute_node.predict.drift import Drift, Way
from compute_node.predict.predictor import Seen

HIDDEN = torch.zeros(1, 2)
EARLY = Way.of("next_router", Seen(1, HIDDEN))
SAID, TRUTH = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 2.0, 1.0]])


def taught(drift: Drift, said: torch.Tensor = SAID, truth: torch.Tensor = TRUTH) -> torch.Tensor:
    for _ in range(100):
        drift.corrected(2, EARLY, said)
        drift.settle(2, truth)
    return drift.corrected(2, EARLY, SAID)


def test_a_constant_error_is_taken_away() -> None:
    drift = Drift()
    assert torch.equal(drift.corrected(2, EARLY, SAID), SAID), "nothing is known yet"
    assert torch.allclose(taught(drift), TRUTH, atol=1e-3)


def test_each_layer_and_way_has_an_error_of_its_own() -> None:
    drift = Drift()
    taught(drift)
    late = Way.of("next_router", Seen(1, HIDDEN, stream=HIDDEN, output=HIDDEN))
    for layer, way in ((3, EARLY), (2, late), (2, EARLY._replace(layer=0))):
        assert torch.equal(drift.corrected(layer, way, SAID), SAID)


def test_the_error_of_several_sequences_is_their_mean() -> None:
    both = torch.tensor([[4.0, 2.0, 1.0], [2.0, 2.0, 1.0]])
    assert taught(Drift(), SAID.repeat(2, 1), both).allclose(
        torch.tensor([[3.0, 2.0, 1.0]]), atol=1e-3
    )


def test_half_precision_is_corrected_in_full() -> None:
    """Red when the sum is rounded to half precision again."""
    drift = Drift()
    taught(drift, SAID.bfloat16(), TRUTH.bfloat16())
    corrected = drift.corrected(2, EARLY, SAID.bfloat16())
    assert torch.allclose(corrected, TRUTH, atol=1e-3)
    assert not torch.equal(corrected, corrected.bfloat16().float())


def test_what_cannot_be_compared_is_not_learned() -> None:
    """Another batch, because a pass was given up; numbers that are not finite."""
    drift = Drift()
    for truth in (TRUTH.repeat(2, 1), torch.tensor([[torch.nan, 0.0, torch.inf]])):
        drift.corrected(2, EARLY, SAID)
        drift.settle(2, truth)
        assert torch.equal(drift.corrected(2, EARLY, SAID), SAID)


def test_what_is_settled_is_not_open_any_more() -> None:
    drift = Drift()
    drift.corrected(2, EARLY, SAID)
    assert drift.is_open(2)
    drift.settle(2, TRUTH)
    assert not drift.is_open(2)
