"""A pass beside the true one gets exact records and leaves the residents as they were, but for the
few that made room.

Planted faults seen red: a loan that becomes a resident, a small record that goes for the exact one,
a loan that is never given back, one that outlives a pass that was given up.
"""

from __future__ import annotations

import pytest

from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.loans import Loans
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.store.session import SessionLost
from proto import errors
from proto.expert import ExpertKey, RecordKey
from tests.fakes import FakeLender, make_capacity

SLOTS, PARTS = 8, 3
SMALL = dict.fromkeys(range(64), "int4")


def full_cache() -> tuple[ExpertCache, FakeLender, Loans]:
    """Experts 0 to 7 of layer 0, used in that order."""
    lender = FakeLender(SLOTS, num_parts=PARTS)
    chooser = PolicyChooser("lru", 16.0, (0, 1), 64, lambda: None)
    cache = ExpertCache(lender, make_capacity(SLOTS, (0, 1), 4, True, PARTS), chooser)
    cache.open()
    for expert in range(SLOTS):
        use(cache, expert)
    return cache, lender, Loans(cache)


def use(cache: ExpertCache, expert: int, small: bool = False) -> None:
    for _ in cache.step(0, [expert], small=SMALL if small else {})[1]:
        pass


def lend(loans: Loans, layer: int, *experts: int) -> set[int]:
    """The hits. Each comes once, as an exact record."""
    hits, waves = loans.step(layer, experts)
    came = [borrowed for wave in waves for borrowed in wave]
    assert all(borrowed.is_exact for borrowed in came)
    assert sorted(borrowed.key.expert for borrowed in came) == sorted(experts)
    return hits


def residents(cache: ExpertCache) -> set[int]:
    return {expert for expert in range(64) if cache.holds(ExpertKey(0, expert))}


def test_the_least_valued_make_room_and_nothing_else_changes() -> None:
    cache, lender, loans = full_cache()
    assert lend(loans, 0, 7, 20, 21, 22) == {7}
    assert lend(loans, 1, 30, 31, 32, 33) == set()
    loans.end()
    assert residents(cache) == {2, 3, 4, 5, 6, 7}
    assert set(lender.held) == {RecordKey.exact(0, expert) for expert in range(2, 8)}
    assert not cache.room.under_way
    counted = [(c.hits, c.misses) for c in cache.counters.values()]
    assert counted == [(0, SLOTS), (0, 0)], "the true passes' alone"
    assert loans.bytes_read > 0
    use(cache, 8)
    use(cache, 9)
    assert residents(cache) == set(range(2, 10)), "the room is the true pass's again"


def test_a_small_record_stays_beside_a_loan_of_the_exact_one() -> None:
    cache, lender, loans = full_cache()
    use(cache, 40, small=True)
    assert lend(loans, 0, 40) == set()
    assert {RecordKey.exact(0, 40), RecordKey(ExpertKey(0, 40), "int4")} <= set(lender.held)
    loans.end()
    assert cache.holds(ExpertKey(0, 40)) and ExpertKey(0, 40) not in cache


def test_a_damaged_record_is_not_given_back() -> None:
    _, lender, loans = full_cache()
    lender.damaged.add(RecordKey.exact(0, 21))
    with pytest.raises(errors.ExpertDamaged):
        lend(loans, 0, 20, 21)
    loans.end()
    assert set(lender.held) == {RecordKey.exact(0, expert) for expert in range(2, 8)}


def test_a_pass_that_is_given_up_leaves_no_lease() -> None:
    """What is on its way would come to nobody: the session ends, and the next starts warm."""
    cache, lender, loans = full_cache()
    left = [None] * 2

    def check() -> None:
        if not left:
            raise errors.Cancelled("the caller went away")
        left.pop()

    with pytest.raises(errors.Cancelled):
        list(loans.step(0, [20, 21, 22], check)[1])
    loans.end()
    assert not lender.is_open and not residents(cache) and not cache.room.under_way
    use(cache, 1)
    assert lender.num_opened == 2


def test_a_lost_session_is_opened_by_the_true_pass() -> None:
    cache, lender, loans = full_cache()
    lender.break_next = True
    with pytest.raises(SessionLost):
        lend(loans, 0, 20)
    loans.end()
    assert lender.num_opened == 1
    use(cache, 1)
    assert lender.num_opened == 2
