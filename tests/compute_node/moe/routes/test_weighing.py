"""How routers weigh is found out from what they return. Red where total and scale are mixed up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compute_node.moe.routes.weighing import Weighing, WeighingWatch, recognise
from proto import errors

LOGITS = torch.randn(12, 16, generator=torch.Generator().manual_seed(0)) * 2


def _chosen(scores: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = scores.topk(4, dim=-1)
    return ids, weights


def _renormalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(dim=-1, keepdim=True)


def _qwen(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over all, the chosen renormalised."""
    ids, weights = _chosen(LOGITS.softmax(dim=-1))
    return LOGITS, ids, _renormalised(weights).to(dtype)


def test_softmax_renormalised() -> None:
    found = recognise(*_qwen())
    assert found == Weighing("softmax", pytest.approx(1.0), 1.0)  # type: ignore[arg-type]
    assert recognise(*_qwen(torch.bfloat16)).kind == "softmax"  # type: ignore[union-attr]


def test_softmax_as_it_is_and_scaled() -> None:
    """OLMoE; DeepSeek-V2 has a factor."""
    ids, weights = _chosen(LOGITS.softmax(dim=-1))
    found = recognise(LOGITS, ids, weights * 2.5)
    assert found is not None and found.total is None and found.scale == pytest.approx(2.5)


def test_softmax_of_the_chosen_alone() -> None:
    """gpt-oss."""
    ids, chosen = _chosen(LOGITS)
    found = recognise(LOGITS, ids, chosen.softmax(dim=-1))
    assert found is not None and (found.kind, found.total) == ("softmax", pytest.approx(1.0))


def test_sigmoid_and_probabilities() -> None:
    ids, chosen = _chosen(LOGITS.sigmoid())
    found = recognise(LOGITS, ids, _renormalised(chosen))
    assert found is not None and found.kind == "sigmoid"
    probabilities = LOGITS.softmax(dim=-1)
    found = recognise(probabilities, *_chosen(probabilities))
    assert found == Weighing("probabilities", None, pytest.approx(1.0))  # type: ignore[arg-type]


def test_weights_of_other_experts_follow() -> None:
    """As the router would have weighed them."""
    scores, ids, weights = _qwen()
    found = recognise(scores, ids, weights)
    assert found is not None
    again = found.weigh(found.gates(scores)[0, ids[0]])
    assert torch.allclose(again, weights[0])


def test_what_is_chosen_otherwise_is_not_recognised() -> None:
    """By groups, or with a correction that scores do not show; or weights of another kind."""
    scores, ids, weights = _qwen()
    worst = (-LOGITS).topk(4, dim=-1).indices
    assert recognise(scores, worst, weights) is None
    assert recognise(scores, ids, torch.rand(weights.shape)) is None


def test_a_watch_needs_some_tokens_and_then_knows_or_refuses() -> None:
    scores, ids, weights = _qwen()
    watch = WeighingWatch(3)
    for row in range(3):
        assert watch.look(scores[row : row + 1], ids[row : row + 1], weights[row : row + 1]) is None
    assert watch.look(scores[3:4], ids[3:4], weights[3:4]) is not None
    with pytest.raises(errors.CheckpointUnsupported, match="layer 5 can only be routed exactly"):
        WeighingWatch(5).look(scores, ids, torch.rand(weights.shape))
    with pytest.raises(errors.CheckpointUnsupported, match="not recognised"):
        WeighingWatch(5).look(None, ids, weights)
