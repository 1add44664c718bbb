"""What a node is told to follow.

Planted faults seen red: another budget, a policy that nobody can score, an impossible budget and a
forgotten node not looked at; an empty policy before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from proto import errors
from proto.access import DecodeAccess
from scheduler.policy.decayed import Decayed
from scheduler.policy.lru import Lru
from scheduler.shadow.advisor import Advisor
from scheduler.simulate.ranking import RankingPolicy, Ranks
from tests.scheduler.traces import decode_step, prefill

SHAPE = (2, 8)
NAMES = ("decayed", "lru", "river")


class Advising(Lru):
    """Says what it thinks of unused experts, too."""

    def unused_ranks(self) -> Ranks:
        return self.ranks() / 2

    def heard_ranks(self, event: DecodeAccess) -> Ranks:
        return self.unused_ranks()


def test_a_verdict_says_what_it_knows_and_as_of_when() -> None:
    """A policy that knows only ranks says no more; the time is that of the newest step. Red when
    either table is sent for the other, or the time is that of the first step.
    """
    for policy, divisor in ((Advising, 2), (Lru, None)):
        advisor = Advisor(("river",), lambda _, make=policy: {"river": make(SHAPE)}, 64, "river")
        for step in range(3):
            advisor.observe(decode_step([[0, 1], [2, 3]], step=step, time_ns=10 + step, slots=4))
        verdict = advisor.advise("node-a")
        assert verdict.as_of_ns == 12 and verdict.scores is not None
        if divisor is None:
            assert verdict.unused_scores is None
        else:
            np.testing.assert_array_equal(verdict.unused_scores, verdict.scores / divisor)


def make(node: str) -> Mapping[str, RankingPolicy]:
    return {"decayed": Decayed(SHAPE), "lru": Lru(SHAPE), "river": Lru(SHAPE)}


def steps(advisor: Advisor, count: int, node: str = "node-a", slots: int = 4) -> None:
    for step in range(count):
        ids = [[step % 8, (step + 1) % 8]] * 2
        advisor.observe(decode_step(ids, step=step, node=node, slots=slots))


def test_a_node_that_told_of_no_step_falls_back() -> None:
    verdict = Advisor(NAMES, make, 64, policy="lru").advise("nobody")
    assert (verdict.policy, verdict.scores) == ("decayed", None)


@pytest.mark.parametrize(("policy", "scored"), [("auto", False), ("lfu", False), ("river", True)])
def test_the_configured_policy_is_in_charge(policy: str, scored: bool) -> None:
    advisor = Advisor(NAMES, make, 64, policy)
    steps(advisor, 5)
    verdict = advisor.advise("node-a")
    assert verdict.policy == ("decayed" if policy == "auto" else policy)
    assert (verdict.scores is not None) == scored
    [report] = advisor.reports()
    assert (report.node, report.in_charge, report.steps) == ("node-a", verdict.policy, 5)


def test_scores_that_nobody_can_give_are_refused_at_the_start() -> None:
    with pytest.raises(errors.ConfigInvalid, match="flashmoe calibrate"):
        Advisor(NAMES, make, 64, policy="learned")


def test_shadows_begin_anew_under_another_budget() -> None:
    advisor = Advisor(NAMES, make, 64)
    steps(advisor, 5)
    steps(advisor, 3, slots=6)
    [report] = advisor.reports()
    assert (report.steps, report.slots, advisor.restarts) == (3, 6, 1)


def test_nodes_are_apart_and_forgotten_on_request() -> None:
    advisor = Advisor(NAMES, make, 64)
    for node, count in (("a", 2), ("b", 3)):
        steps(advisor, count, node)
    assert {report.node: report.steps for report in advisor.reports()} == {"a": 2, "b": 3}
    advisor.keep(["b"])
    assert [report.node for report in advisor.reports()] == ["b"]


def test_checks_budgets_and_nothing_else() -> None:
    advisor = Advisor(NAMES, make, 64)
    advisor.check(prefill([[1] * 8] * 2, num_tokens=4))
    advisor.check(decode_step([[0, 1], [2, 3]], slots=4))
    with pytest.raises(errors.MessageInvalid, match="slots"):
        advisor.check(decode_step([[0, 1], [2, 3]], slots=3))
    assert advisor.reports() == ()


def test_scores_can_be_published() -> None:
    advisor = Advisor(NAMES, make, 64, policy="river")
    steps(advisor, 5)
    scores = advisor.advise("node-a").scores
    assert scores is not None
    assert (scores.dtype, scores.shape) == (np.float32, SHAPE)
