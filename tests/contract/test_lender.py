"""The fake lender behaves as a store client on a real store does.

Planted fault seen red: a fake that forgets releases when an expert is damaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from compute_node.cache.lender import Lender
from compute_node.store.borrow import StoreClient
from compute_node.store.session import SessionLost
from proto import errors
from proto.expert import RecordKey
from tests.fakes import FakeLender
from tests.local_store import local_store
from tests.system.test_damage import copy_of_shipped_model, flip_expert

KEYS = [RecordKey.exact(0, expert) for expert in range(8)]
DAMAGED = RecordKey.exact(1, 3)
Damage = Callable[[], None]


@contextmanager
def fake(tmp_path: Path) -> Iterator[tuple[Lender, Damage]]:
    lender = FakeLender(4)
    yield lender, lambda: lender.damaged.add(DAMAGED)


@contextmanager
def real(tmp_path: Path) -> Iterator[tuple[Lender, Damage]]:
    root, store_dir = copy_of_shipped_model(tmp_path)
    with local_store(store_dir, tmp_path, 8) as address:
        client = StoreClient(address, "n", 4, tmp_path / "sessions", deadline_s=5)
        try:
            yield client, lambda: flip_expert(root, store_dir, DAMAGED.expert)
        finally:
            client.close()


@pytest.fixture(params=[fake, real], ids=["fake", "real"])
def lender(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Lender, Damage]]:
    with request.param(tmp_path) as made:
        made[0].open()
        yield made


def test_lends_each_once_and_counts_only_what_was_read(lender: tuple[Lender, Damage]) -> None:
    store, _ = lender
    arrivals = store.exchange([], KEYS[:3])
    assert sorted(arrival.record for arrival in arrivals) == KEYS[:3]
    assert all(arrival.bytes_read > 0 for arrival in arrivals)
    [again] = store.exchange([KEYS[0]], [KEYS[3]])
    assert again.bytes_read > 0
    [back] = store.exchange([KEYS[1]], [KEYS[0]])
    assert back.bytes_read == 0, "it was in memory still"
    assert set(KEYS[:4]) <= set(store.resident())


def test_lease_is_current_until_the_session_ends(lender: tuple[Lender, Damage]) -> None:
    store, _ = lender
    [arrival] = store.exchange([], KEYS[:1])
    assert store.is_current(arrival)
    store.abort()
    assert not store.is_open and not store.is_current(arrival)
    with pytest.raises(SessionLost):
        store.exchange([], KEYS[:1])
    store.open()
    assert store.exchange([], KEYS[:1])[0].bytes_read == 0


def test_damaged_expert_raises_and_the_session_goes_on(lender: tuple[Lender, Damage]) -> None:
    store, damage = lender
    damage()
    store.exchange([], KEYS[:2])
    with pytest.raises(errors.ExpertDamaged):
        store.exchange([KEYS[0]], [KEYS[4], DAMAGED])
    assert store.is_open
    assert len(store.exchange([KEYS[1], KEYS[4]], KEYS[4:8])) == 4, "the quota is whole, 4 was lent"


def test_what_is_in_memory_comes_first(lender: tuple[Lender, Damage]) -> None:
    store, _ = lender
    store.exchange([], KEYS[:2])
    parts = list(store.borrow(KEYS[:2], [KEYS[4], KEYS[1], KEYS[5], KEYS[0]]))
    assert {arrival.record for arrival in parts[0]} == {KEYS[0], KEYS[1]}
    assert {arrival.record for part in parts[1:] for arrival in part} == {KEYS[4], KEYS[5]}


def test_two_loans_may_be_under_way_and_answered_in_any_order(
    lender: tuple[Lender, Damage],
) -> None:
    store, _ = lender
    first, second = store.borrow([], KEYS[:2]), store.borrow([], KEYS[2:4])
    later = [arrival.record for part in second for arrival in part]
    assert sorted(later) == KEYS[2:4]
    assert sorted(arrival.record for part in first for arrival in part) == KEYS[:2]


def test_guesses_are_said_and_not_waited_for(lender: tuple[Lender, Damage]) -> None:
    store, _ = lender
    store.exchange([], KEYS[:1])
    assert list(store.borrow([], [], prefetches=KEYS[4:6])) == []
    assert list(store.borrow([], [], withdrawals=KEYS[4:6])) == []
    assert len(store.exchange([], KEYS[4:6])) == 2


def test_check_may_abandon_an_exchange(lender: tuple[Lender, Damage]) -> None:
    store, _ = lender

    def check() -> None:
        raise errors.Cancelled("gone")

    with pytest.raises(errors.Cancelled):
        store.exchange([], KEYS[:1], check)


def test_a_loan_outlives_whoever_gave_it_up(lender: tuple[Lender, Damage]) -> None:
    store, damage = lender
    damage()
    gone = [True]

    def check() -> None:
        if gone:
            raise errors.Cancelled("gone")

    loan = store.borrow([], [*KEYS[:2], DAMAGED], check)
    with pytest.raises(errors.Cancelled):
        list(loan)
    assert store.is_open
    gone.clear()
    with pytest.raises(errors.ExpertDamaged):
        list(loan)
    assert list(loan) == [], "it is told once"
    assert len(store.exchange(KEYS[:2], KEYS[4:8])) == 4, "the quota is whole"
