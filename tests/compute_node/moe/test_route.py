"""Every route goes through the policy, and the policy's route is what is computed and recorded.

Planted faults seen red: the router's choice computed whatever the policy said, another layer's
residents shown to it.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from compute_node.cache.expert_cache import Budget, ExpertCache
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.moe import layer as routed
from compute_node.moe.route import EXACT, Route
from compute_node.moe.step import Batch, Part, Phase, Step
from compute_node.predict.layer_timer import LayerTimer
from tests.fakes import FakeLender

LAYERS, NUM_EXPERTS = (1, 3), 16


class OnlyResident:
    """Leaves out what would have to be read."""

    def apply(self, route: Route, resident: Container[int]) -> Route:
        ids = [[e if e in resident else NUM_EXPERTS for e in row] for row in route.ids.tolist()]
        return replace(route, ids=torch.tensor(ids))


def test_the_exact_policy_returns_its_argument() -> None:
    route = Route(torch.tensor([[1, 2]]), torch.ones(1, 2))
    assert EXACT.apply(route, ()) is route


def test_what_the_policy_says_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    chooser = PolicyChooser("lru", 16.0, LAYERS, NUM_EXPERTS, lambda: None)
    cache = ExpertCache(FakeLender(), Budget(8, LAYERS, 2, pooled=True), chooser)
    cache.open()
    for layer, expert in ((1, 4), (3, 5)):
        list(cache.step(layer, [expert])[1])
    computed: list[int] = []

    def total_of(*_: object) -> SimpleNamespace:
        def add(wave: list[SimpleNamespace]) -> None:
            computed.extend(borrowed.key.expert for borrowed in wave)

        return SimpleNamespace(add=add, result=lambda: torch.zeros(1, 4))

    monkeypatch.setattr(routed, "_total_of", total_of)
    experts = routed.RoutedExperts(1, None, cache, None, LayerTimer(cache), OnlyResident())  # type: ignore[arg-type]
    step = Step(Batch(Part("s", Phase.PREFILL, 1, 1)), lambda: None)
    with step.running():
        module = SimpleNamespace(num_experts=NUM_EXPERTS)
        experts.forward(module, torch.ones(1, 4), torch.tensor([[4, 5]]), torch.ones(1, 2))
    assert computed == [4], "expert 5 is resident in another layer alone"
    assert step.accesses[1].ids.tolist() == [[4, NUM_EXPERTS]]
    assert step.accesses[1].hits == {4}
