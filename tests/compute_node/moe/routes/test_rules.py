"""Every rule against choices worked out by hand, and against a plain statement of it on random
tokens.

Planted faults seen red: the bonus given to experts that are not resident, substitutes taken twice,
the best expert left out, weights that keep the replaced expert's gate.
"""

from __future__ import annotations

import math
import random

import pytest
import torch

from compute_node.moe.route import EXACT, Route
from compute_node.moe.routes.precision import Precision
from compute_node.moe.routes.prior import Prior
from compute_node.moe.routes.rules import RuledRoute, policy_of
from compute_node.moe.routes.skip import Skip
from compute_node.moe.routes.substitute import Substitute
from compute_node.moe.routes.token import Rule, TokenChoice
from compute_node.moe.routes.weighing import Weighing
from proto import errors

# Gates of six experts, two of them chosen: .5 and .2; the best of the others has .16.
GATES = (0.5, 0.2, 0.16, 0.1, 0.03, 0.01)
TOKEN = TokenChoice([0, 1], GATES, torch.tensor(GATES).log().tolist())


@pytest.mark.parametrize(
    ("rule", "resident", "expected"),
    [
        (Substitute(0.5), {2}, [0, 2]),  # .2 is not above 1.5 * .16, and .16 is the best
        (Substitute(0.2), {2}, [0, 1]),  # .2 is above 1.2 * .16
        (Substitute(0.5), {3}, [0, 3]),  # .1 is within .5 * .16
        (Substitute(0.3), {3}, [0, 1]),  # but not within .7 * .16
        (Substitute(0.5), {1, 2}, [0, 1]),  # what is resident stays
        (Substitute(0.5), (), [0, 1]),
        (Prior(0.1), {2}, [0, 2]),  # .39 of log range 3.91 lifts .16 to .237
        (Prior(0.05), {2}, [0, 1]),  # .195 lifts it to .194
        (Prior(0.1), {1, 2}, [0, 1]),
        (Prior(1.0), {4, 5}, [0, 4]),  # the best is kept
        (Skip(0.6), (), [0]),  # .2 is below .6 * .35
        (Skip(0.5), (), [0, 1]),
        (Skip(1.0), {1}, [0, 1]),
    ],
)
def test_choices_by_hand(rule: Rule, resident: set[int], expected: list[int]) -> None:
    assert rule.choose(TOKEN, resident) == expected


@pytest.mark.parametrize(
    ("strength", "expected"),
    [(0.0, set()), (0.1, set()), (0.2, {2}), (0.45, {1, 2}), (0.99, {1, 2}), (1.0, {0, 1, 2})],
)
def test_precision_by_hand(strength: float, expected: set[int]) -> None:
    """Gates .5, .2 and .16 of .86: before them 0, .58 and .81 of the whole."""
    assert Precision(strength).small([2, 0, 1], [0.16, 0.5, 0.2]) == expected


def _plain_precision(weights: dict[int, float], strength: float) -> set[int]:
    total, found = math.fsum(weights.values()), set[int]()
    for expert, weight in weights.items():
        heavier = math.fsum(other for other in weights.values() if other > weight)
        if strength and heavier >= (1 - strength) * total:
            found.add(expert)
    return found


def test_precision_is_its_plain_statement() -> None:
    chance = random.Random(5)
    for _ in range(300):
        token, _ = _random_token(chance)
        strength = chance.choice([0.0, 0.3, 0.6, 0.9, 1.0])
        weights = {expert: token.gates[expert] for expert in token.chosen}
        found = Precision(strength).small(list(weights), list(weights.values()))
        assert found == _plain_precision(weights, strength)


def test_an_expert_that_is_named_twice_is_small_only_if_both_times() -> None:
    assert Precision(0.9).small([1, 2, 1], [0.5, 0.3, 0.2]) == {2}


def test_precision_goes_by_what_the_rules_before_it_chose() -> None:
    route = _route(Weighing("softmax", 1.0, 1.0))
    policy = policy_of("substitute .5 + precision .9")
    found = policy.apply(route, {2})
    assert found.ids.tolist() == [[0, 2]] and found.small == (frozenset({2}),)
    assert policy.apply(route, {0, 1}).small == (frozenset({1}),), "when no rule has to act, too"
    assert found.small_experts == {2}


def test_an_expert_is_small_only_where_every_token_allows_it() -> None:
    small = frozenset({1, 2}), frozenset({2})
    ids = torch.tensor([[0, 1, 2], [1, 2, 3]])
    assert Route(ids, torch.ones(2, 3), small=small).small_experts == {2}


@pytest.mark.parametrize("text", ["precision .5 + skip .5", "precision .5 + precision .4"])
def test_precision_comes_last(text: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="say it last"):
        policy_of(text)


def _plain_substitute(token: TokenChoice, resident: set[int], alpha: float) -> set[int]:
    """Algorithm 1, expert by expert from the best."""
    order = sorted(range(len(token.gates)), key=lambda e: -token.gates[e])
    top, limit = order[: len(token.chosen)], token.gates[order[len(token.chosen)]]
    found, free = set[int](), set(order[len(token.chosen) :]) & resident
    for expert in top:
        best = max(free, key=lambda e: token.gates[e], default=None)
        if token.gates[expert] > (1 + alpha) * limit or expert in resident or best is None:
            found.add(expert)
        elif token.gates[best] >= (1 - alpha) * limit:
            found.add(best)
            free.remove(best)
        else:
            found.add(expert)
    return found


def _plain_prior(token: TokenChoice, resident: set[int], strength: float) -> set[int]:
    span = max(token.logits) - min(token.logits)
    best = max(range(len(token.logits)), key=lambda e: token.logits[e])
    lifted = {e: x + (strength * span if e in resident else 0) for e, x in enumerate(token.logits)}
    others = sorted(set(lifted) - {best}, key=lambda e: -lifted[e])
    return {best, *others[: len(token.chosen) - 1]}


def _random_token(chance: random.Random) -> tuple[TokenChoice, set[int]]:
    logits = torch.tensor([chance.gauss(0, 2) for _ in range(16)])
    gates = logits.softmax(0)
    chosen = gates.topk(4).indices.tolist()
    resident = {e for e in range(16) if chance.random() < 0.4}
    return TokenChoice(chosen, gates.tolist(), logits.tolist()), resident


@pytest.mark.parametrize("number", [0.0, 0.05, 0.25, 0.5, 0.9])
def test_choices_of_random_tokens(number: float) -> None:
    chance = random.Random(1)
    num_changed = 0
    for _ in range(300):
        token, resident = _random_token(chance)
        substituted = set(Substitute(number).choose(token, resident))
        preferred = set(Prior(number).choose(token, resident))
        assert substituted == _plain_substitute(token, resident, number)
        assert preferred == _plain_prior(token, resident, number)
        num_changed += substituted != set(token.chosen) or preferred != set(token.chosen)
    assert (num_changed > 10) == (number > 0)


def _route(weighing: Weighing | None) -> Route:
    scores = torch.tensor([GATES]).log()
    weights = torch.tensor([[0.5, 0.2]]) / (0.7 if weighing and weighing.total else 1)
    return Route(torch.tensor([[0, 1]]), weights, scores, weighing)


def test_the_substitute_has_its_own_weight() -> None:
    policy = RuledRoute([Substitute(0.5)])
    found = policy.apply(_route(Weighing("softmax", None, 1.0)), {2})
    assert found.ids.tolist() == [[0, 2]]
    assert found.weights[0].tolist() == pytest.approx([0.5, 0.16])
    found = policy.apply(_route(Weighing("softmax", 1.0, 1.0)), {2})
    assert found.weights[0].tolist() == pytest.approx([0.5 / 0.66, 0.16 / 0.66])


def test_what_is_left_out_is_marked_and_weighs_nothing() -> None:
    found = RuledRoute([Skip(1.0)]).apply(_route(Weighing("softmax", 1.0, 1.0)), ())
    assert found.ids.tolist() == [[0, len(GATES)]]
    assert found.weights[0].tolist() == pytest.approx([1.0, 0.0])


def test_an_unchanged_token_keeps_its_route_bit_for_bit() -> None:
    """Weights computed again could differ in a last bit."""
    route = _route(Weighing("softmax", 1.0, 1.0))
    odd = Route(route.ids, route.weights + 0.1, route.scores, route.weighing)
    found = RuledRoute([Prior(0.5), Skip(1.0)]).apply(odd, {0, 1})
    assert torch.equal(found.ids, odd.ids) and torch.equal(found.weights, odd.weights)
    unknown = _route(None)
    assert RuledRoute([Skip(1.0)]).apply(unknown, ()) is unknown


def test_a_rule_sees_what_the_one_before_it_chose() -> None:
    policy = policy_of("substitute .5 + skip 1")
    found = policy.apply(_route(Weighing("softmax", None, 1.0)), {3})
    assert found.ids.tolist() == [[0, 3]]
    assert policy_of("skip 1 + substitute .5").apply(
        _route(Weighing("softmax", None, 1.0)), {3}
    ).ids.tolist() == [[0, len(GATES)]]


@pytest.mark.parametrize("text", ["", " ", "exact"])
def test_exact_is_the_routers_choice(text: str) -> None:
    assert policy_of(text) is EXACT


@pytest.mark.parametrize(
    "text", ["prior", "prior 2", "prior -1", "prior x", "none .5", "skip .5 +"]
)
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="is no rule: say exact, or substitute"):
        policy_of(text)


def test_a_token_that_was_chosen_otherwise_keeps_its_route() -> None:
    """By groups, or by transformers' mark for no expert. Red with an IndexError."""
    weighing, scores = Weighing("softmax", 1.0, 1.0), torch.tensor([GATES]).log()
    for chosen in ([0, 3], [0, len(GATES)]):
        route = Route(torch.tensor([chosen]), torch.tensor([[0.6, 0.4]]), scores, weighing)
        found = RuledRoute([Prior(1.0), Substitute(1.0), Skip(1.0)]).apply(route, {2})
        assert torch.equal(found.ids, route.ids) and torch.equal(found.weights, route.weights)


def test_a_probability_of_nothing_has_a_finite_logit() -> None:
    logits = Weighing("probabilities", None, 1.0).logits(torch.tensor([[0.5, 0.5, 0.0]]))
    assert torch.isfinite(logits).all()
