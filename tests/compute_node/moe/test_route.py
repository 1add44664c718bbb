"""Every route goes through the policy, and the policy's route is what is computed and recorded.

Planted faults seen red: the router's choice computed whatever the policy said, another layer's
residents shown to it.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.engine.sequence import SequenceState
from compute_node.moe.layer import RoutedExperts, _num_changed
from compute_node.moe.local import LocalBackend
from compute_node.moe.route import EXACT, Route
from compute_node.moe.step import Batch, Part, Phase, Step
from compute_node.moe.sums import Sum
from compute_node.predict.layer_timer import LayerTimer
from tests.fakes import FakeLender, make_capacity

LAYERS, NUM_EXPERTS = (1, 3), 16


class OnlyResident:
    """Leaves out what would have to be read."""

    needs_scores = needs_small = False

    def apply(self, route: Route, resident: Container[int]) -> Route:
        ids = [[e if e in resident else NUM_EXPERTS for e in row] for row in route.ids.tolist()]
        return replace(route, ids=torch.tensor(ids))


def test_the_exact_policy_returns_its_argument() -> None:
    route = Route(torch.tensor([[1, 2]]), torch.ones(1, 2))
    assert EXACT.apply(route, ()) is route


class Backend:
    """Computes nothing, and keeps what it was asked for."""

    resident = (4,)

    def __init__(self) -> None:
        self.asked: list[Sequence[int]] = []

    def run(
        self,
        step: Step,
        hidden: Tensor,
        route: Route,
        experts: Sequence[int],
        sums: Sequence[Sum],
        small: Collection[int] = (),
    ) -> set[int]:
        self.asked.append(experts)
        return set(experts)


def test_what_the_policy_says_is_computed() -> None:
    backend = Backend()
    experts = RoutedExperts(1, None, backend)  # type: ignore[arg-type]
    decode = Batch(Part("s", Phase.DECODE, 1, 1))
    step = Step(decode, lambda: None, policy=OnlyResident())
    with step.running():
        module = SimpleNamespace(num_experts=NUM_EXPERTS)
        experts.forward(module, torch.ones(1, 4), torch.tensor([[4, 5]]), torch.ones(1, 2))
    assert backend.asked == [[4]]
    assert step.accesses[1].ids.tolist() == [[4, 5]], "what the router chose is what is learned"
    assert step.accesses[1].hits == {4}
    assert (step.num_substituted, step.num_skipped) == (0, 1)


def test_prompts_go_the_routers_way_unless_they_are_asked_not_to() -> None:
    policy = OnlyResident()
    sequence = SequenceState("s", [], policy=policy)
    assert sequence.policy_of(Phase.PREFILL) is EXACT
    assert sequence.policy_of(Phase.DECODE) is policy
    sequence = SequenceState("s", [], policy=policy, routes_prompt=True)
    assert sequence.policy_of(Phase.PREFILL) is policy


def test_residents_are_those_of_the_layer() -> None:
    chooser = PolicyChooser("lru", 16.0, LAYERS, NUM_EXPERTS, lambda: None)
    cache = ExpertCache(FakeLender(), make_capacity(8, LAYERS, 2, pooled=True), chooser)
    cache.open()
    for layer, expert in ((1, 4), (3, 5)):
        list(cache.step(layer, [expert])[1])
    resident = LocalBackend(1, cache, None, LayerTimer(cache)).resident  # type: ignore[arg-type]
    assert [expert for expert in range(NUM_EXPERTS) if expert in resident] == [4]


def test_what_is_left_out_is_counted_and_not_where_it_stood() -> None:
    """Red where places are compared: what comes after a gap moves up."""
    before = torch.tensor([[3, 4, 5], [1, 2, 6]])
    after = torch.tensor([[3, 5, NUM_EXPERTS], [2, 1, 7]])
    assert _num_changed(before, after, NUM_EXPERTS) == (2, 1)
