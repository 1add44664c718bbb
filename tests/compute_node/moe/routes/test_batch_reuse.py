"""Several tokens at once: what one of them is sure to need counts as resident for all.

Planted faults seen red: what a token reads under these residents counted (two tokens swap their
experts, and nothing is saved), tokens that no rule may change not counted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from compute_node.moe.route import Route
from compute_node.moe.routes.rules import RuledRoute, policy_of
from compute_node.moe.routes.weighing import Weighing

NUM_EXPERTS, TOP_K = 16, 4
WEIGHING = Weighing("softmax", None, 1.0)
TEXTS = (
    "substitute .5",
    "prior .1",
    "skip .75",
    "prior .1 + skip .75",
    "substitute .9 + skip .5",
    "skip .5 + prior .2",
)


def of(rows: Sequence[Sequence[float]], chosen: Tensor | None = None) -> Route:
    """Softmax gates, and the best `TOP_K` by score unless others were chosen."""
    scores = torch.tensor(rows)
    ids = scores.topk(TOP_K, dim=-1).indices if chosen is None else chosen
    return Route(ids, scores.softmax(dim=-1).gather(1, ids), scores, WEIGHING)


def used(policy: RuledRoute, route: Route, resident: set[int]) -> list[set[int]]:
    found = policy.apply(route, resident).ids.tolist()
    return [{expert for expert in row if expert < NUM_EXPERTS} for row in found]


def plainly(policy: RuledRoute, rows: list[list[float]], resident: set[int]) -> list[set[int]]:
    """Each token alone, where also what is sure is resident. A token alone needs for sure what it
    uses though that one expert is the only one that is not resident.
    """
    sure = set[int]()
    for row in rows:
        for expert in of([row]).ids[0].tolist():
            others = set(range(NUM_EXPERTS)) - {expert}
            if expert in used(policy, of([row]), others)[0]:
                sure.add(expert)
    return [used(policy, of([row]), resident | sure)[0] for row in rows]


def drawn(chance: random.Random, num_rows: int) -> list[list[float]]:
    return [[chance.gauss(0, 1.5) for _ in range(NUM_EXPERTS)] for _ in range(num_rows)]


def policy(text: str) -> RuledRoute:
    found = policy_of(text)
    assert isinstance(found, RuledRoute)
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_a_batch_is_its_plain_statement_in_any_order(text: str) -> None:
    chance = random.Random(3)
    num_reused = 0
    for _ in range(60):
        rows = drawn(chance, chance.choice([2, 3, 8]))
        resident = {e for e in range(NUM_EXPERTS) if chance.random() < 0.3}
        found = used(policy(text), of(rows), resident)
        assert found == plainly(policy(text), rows, resident)
        assert used(policy(text), of(rows[::-1]), resident) == found[::-1]
        alone = [used(policy(text), of([row]), resident)[0] for row in rows]
        num_reused += found != alone
    assert num_reused > 10, "else the batch changed nothing"


@pytest.mark.parametrize("text", TEXTS)
def test_what_counts_as_read_is_read(text: str) -> None:
    """Whatever is resident, what is sure is used by the token that it is sure for."""
    chance = random.Random(4)
    num_sure = 0
    for _ in range(100):
        route = of(drawn(chance, 1))
        for expert in route.ids[0].tolist():
            if expert in used(policy(text), route, set(range(NUM_EXPERTS)) - {expert})[0]:
                num_sure += 1
                resident = {e for e in range(NUM_EXPERTS) if chance.random() < 0.5}
                assert expert in used(policy(text), route, resident)[0]
    assert num_sure > 100


def test_by_hand() -> None:
    """The second token would leave 4 out, but the first reads it. 5 is read by nobody else."""
    low = [-9.0] * (NUM_EXPERTS - 6)
    first, second = [0.0, 0.0, 0.0, -9.0, 0.0, -9.0], [2.0, 2.0, 2.0, -9.0, -1.0, -9.0]
    rows = [[*first, *low], [*second, *low]]
    assert used(policy("skip .5"), of(rows), set()) == [{0, 1, 2, 4}, {0, 1, 2, 4}]
    assert used(policy("skip .5"), of(rows[1:]), set()) == [{0, 1, 2}]
    third = [[2.0, 2.0, 2.0, -9.0, -9.0, -1.0, *low]]
    assert used(policy("skip .5"), of([rows[0], *third]), set())[1] == {0, 1, 2}


def test_a_token_that_no_rule_may_change_is_sure_of_all_it_needs() -> None:
    """The first chose its worst experts, by a table or by groups; 15 among them."""
    first = [0.0] * 12 + [-9.0] * 4
    second = [2.0, 2.0, 2.0] + [-9.0] * 12 + [-1.0]
    route = of([first, second], torch.tensor([[12, 13, 14, 15], [0, 1, 2, 15]]))
    assert used(policy("skip .5"), route, set()) == [{12, 13, 14, 15}, {0, 1, 2, 15}]
    assert used(policy("skip .5"), of([second]), set()) == [{0, 1, 2}]
