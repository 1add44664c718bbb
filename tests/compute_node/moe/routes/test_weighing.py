"""How routers weigh is found out from what they return. Red where total and scale are mixed up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compute_node.moe.routes.weighing import (
    Weighing,
    WeighingWatch,
    names_the_chosen,
    recognise,
    shares,
)
from proto import errors

LOGITS = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) * 2


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
    [found] = recognise(*_qwen())
    assert found == Weighing("softmax", pytest.approx(1.0), 1.0)  # type: ignore[arg-type]
    [found] = recognise(*_qwen(torch.bfloat16))
    assert found.kind == "softmax"


def test_softmax_as_it_is_and_scaled() -> None:
    """OLMoE; DeepSeek-V2 has a factor."""
    ids, weights = _chosen(LOGITS.softmax(dim=-1))
    [found] = recognise(LOGITS, ids, weights * 2.5)
    assert found.total is None and found.scale == pytest.approx(2.5)


def test_softmax_of_the_chosen_alone() -> None:
    """gpt-oss."""
    ids, chosen = _chosen(LOGITS)
    [found] = recognise(LOGITS, ids, chosen.softmax(dim=-1))
    assert (found.kind, found.total) == ("softmax", pytest.approx(1.0))


def test_sigmoid_and_probabilities() -> None:
    ids, chosen = _chosen(LOGITS.sigmoid())
    [found] = recognise(LOGITS, ids, _renormalised(chosen))
    assert found.kind == "sigmoid"
    probabilities = LOGITS.softmax(dim=-1)
    [found] = recognise(probabilities, *_chosen(probabilities))
    assert found == Weighing("probabilities", None, pytest.approx(1.0))  # type: ignore[arg-type]


def test_weights_of_other_experts_follow() -> None:
    """As the router would have weighed them."""
    scores, ids, weights = _qwen()
    [found] = recognise(scores, ids, weights)
    again = found.weigh(found.gates(scores)[0, ids[0]])
    assert torch.allclose(again, weights[0])


def test_what_is_chosen_otherwise_is_not_recognised() -> None:
    """By groups, or with a correction that scores do not show; or weights of another kind."""
    scores, ids, weights = _qwen()
    worst = (-LOGITS).topk(4, dim=-1).indices
    assert recognise(scores, worst, weights) == []
    assert recognise(scores, ids, torch.rand(weights.shape)) == []
    one_odd = ids.clone()
    one_odd[40] = worst[40]
    assert recognise(scores, one_odd, weights) == []


def test_a_watch_needs_some_tokens_and_then_knows_or_refuses() -> None:
    scores, ids, weights = _qwen()
    watch = WeighingWatch(3)
    for row in range(15):
        assert watch.look(scores[row : row + 1], ids[row : row + 1], weights[row : row + 1]) is None
    assert watch.look(scores[15:16], ids[15:16], weights[15:16]) is not None
    with pytest.raises(errors.CheckpointUnsupported, match="layer 5 can only be routed exactly"):
        WeighingWatch(5).look(scores, ids, torch.rand(weights.shape))


def test_equal_scores_may_be_chosen_either_way() -> None:
    """As bf16 has them. Red where one topk is compared with another."""
    scores = torch.tensor([3.0, 2.0, 2.0, 1.0])
    assert names_the_chosen(scores, [0, 1]) and names_the_chosen(scores, [2, 0])
    assert not names_the_chosen(scores, [0, 3])
    assert not names_the_chosen(scores, [0, 0]) and not names_the_chosen(scores, [0, 4])
    assert names_the_chosen(scores, [3, 1, 0, 2])


def test_scores_may_come_late_but_not_never() -> None:
    """A router is recognised after some choices; one at a time, that takes some tokens."""
    scores, ids, weights = _qwen()
    watch = WeighingWatch(5)
    for row in range(63):
        assert watch.look(None, ids[row : row + 1], weights[row : row + 1]) is None
    assert watch.look(scores, ids, weights) is not None
    with pytest.raises(errors.CheckpointUnsupported, match="not recognised"):
        WeighingWatch(5).look(None, ids, weights)


@pytest.mark.parametrize("peaked", [False, True])
def test_tokens_that_leave_two_ways_open_decide_nothing(peaked: bool) -> None:
    """Equal tokens, or a router that gives its chosen experts nearly everything: the weights sum to
    1 and are the gates, too. Red where the first constant that is found is taken.
    """
    scores = LOGITS * 8 if peaked else LOGITS[:1].repeat(64, 1)
    ids, weights = _chosen(scores.softmax(dim=-1))
    weights = _renormalised(weights)
    watch = WeighingWatch(1)
    assert watch.look(scores[:32], ids[:32], weights[:32]) is None
    found = watch.look(scores[32:], ids[32:], weights[32:])
    assert found is not None and found.total == pytest.approx(1.0)


def test_shares_are_of_all_experts_once_the_weighing_is_known() -> None:
    """Red when weights that are scaled, or a router's sigmoids, are taken for shares."""
    scores, ids, weights = _qwen()
    [found] = recognise(scores, ids, weights)
    known = shares(found, scores, ids, weights, scores.shape[1])
    assert torch.allclose(known.float(), scores.softmax(dim=-1), atol=1e-3)
    sigmoid = shares(Weighing("sigmoid", None, 2.5), scores, ids, weights, scores.shape[1])
    assert torch.allclose(sigmoid.float().sum(dim=-1), torch.ones(len(ids)), atol=1e-2)


def test_shares_of_the_chosen_stand_for_what_is_not_known() -> None:
    """An id past the last expert is none."""
    ids, weights = torch.tensor([[2, 0], [4, 1]]), torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    found = shares(None, None, ids, weights, 4)
    assert found.tolist() == [[0.25, 0, 0.75, 0], [0, 1, 0, 0]]
    assert shares(None, None, ids, weights * torch.nan, 4).isfinite().all()


def test_a_glance_does_without_what_a_look_refuses() -> None:
    """Red when it raises, or gives up what a look would find out later."""
    scores, ids, weights = _qwen()
    watch = WeighingWatch(5)
    assert watch.glance(scores, ids, torch.rand(weights.shape)) is None
    assert watch.glance(scores, ids, weights) is None, "it does not try again at every token"
    assert WeighingWatch(5).glance(scores, ids, weights) is not None
    assert watch.look(scores, ids, weights) is not None
    assert watch.glance(scores, ids, weights) is not None
