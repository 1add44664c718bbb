"""What goes, what is read, and in which order.

Planted faults seen red: what is read ahead goes first, an event's own experts go, wrong names are
read all the same, answers that come all at once; more filled than fits, what is expected goes
first, or not even for a step; what moves in expected of the next step, what is coming taken for
there already.
"""

from __future__ import annotations

from math import inf

import pytest

from deploy.simulator.disk import Disk
from deploy.simulator.expert_cache import ExpertCache
from deploy.simulator.geometry import Geometry
from deploy.simulator.setting import Link
from deploy.simulator.wire import Wire
from proto.expert import ExpertKey

A, B, C, D = (ExpertKey(0, expert) for expert in range(4))


def disk() -> Disk:
    """A read takes a second."""
    return Disk(1.0, 0.0, 1.0)


def test_what_is_waited_for_goes_before_what_is_read_ahead() -> None:
    """What has begun is finished."""
    one = disk()
    for key in (A, B, C):
        one.read_ahead(0.0, key)
    assert one.read(0.5, D) == 2.0
    assert one.read(0.5, C) == 3.0
    assert one.read(0.5, A) == 1.0
    assert one.read(9.0, B) == 9.0, "read meanwhile"
    assert (one.num_reads, one.busy_s) == (4, 4.0)


def test_what_has_not_begun_can_be_withdrawn() -> None:
    one = disk()
    one.read_ahead(0.0, A)
    one.read_ahead(0.0, B)
    assert not one.withdraw(0.5, A)
    assert one.withdraw(0.5, B)
    assert one.read(5.0, C) == 6.0
    assert one.num_reads == 2


def test_an_events_own_experts_stay() -> None:
    """They were used once each, the others often."""
    cache = ExpertCache(4, 3, disk())
    for _ in range(5):
        cache.step(0.0, 0, [8, 9])
    cache.step(0.0, 0, [0, 1])
    cache.step(0.0, 0, [0, 1, 2])
    assert all(key in cache for key in (A, B, C))
    assert len(cache) == 4


def test_what_is_expected_goes_last() -> None:
    cache = ExpertCache(3, 2, disk())
    cache.prepare(0.0, 1, [5])
    cache.step(0.0, 0, [0, 1])
    cache.step(0.0, 0, [2, 3])
    assert ExpertKey(1, 5) in cache
    cache.step(0.0, 0, [6, 7])
    assert cache.step(9.0, 1, [5]) == [9.0]


def test_a_step_takes_what_is_expected_if_nothing_else_is_left() -> None:
    cache = ExpertCache(2, 2, disk())
    cache.prepare(0.0, 1, [0, 1])
    cache.step(0.0, 0, [0, 1])
    assert len(cache) == 2 and A in cache and B in cache


def test_names_take_no_place_from_what_is_expected() -> None:
    cache = ExpertCache(2, 2, disk())
    cache.prepare(0.0, 1, [0, 1])
    cache.prepare(0.0, 2, [0, 1])
    assert ExpertKey(1, 0) in cache and ExpertKey(2, 0) not in cache


def test_a_wrong_name_is_not_read_once_it_is_known() -> None:
    """The first is being read by then."""
    one = disk()
    cache = ExpertCache(4, 2, one)
    cache.prepare(0.0, 0, [0, 1, 2])
    assert cache.step(0.5, 0, [0, 3]) == [1.0, 2.0]
    assert (one.num_reads, len(cache)) == (2, 2)
    assert (cache.num_hits, cache.num_misses) == (1, 1)


def test_what_is_filled_is_no_more_than_fits() -> None:
    cache = ExpertCache(2, 2, disk())
    cache.fill([A, B, C])
    assert A in cache and B in cache and C not in cache


@pytest.mark.parametrize("link", [Link(0.0, 8.0), Link(0.0, inf, serial_s=2 * 2064.0)])
def test_answers_that_come_at_once_wait_for_each_other(link: Link) -> None:
    """One expert of 1000 numbers each: 2,064 bytes of a second each, or as many of programs."""
    wire = Wire(link, Geometry("hand", 1, 4, 2, 1.0, 0.0, 1000))
    assert [wire.answer(1.0, 1) for _ in range(3)] == [2065.0, 4129.0, 6193.0]
    assert wire.num_bytes == 3 * 2064


def test_what_moves_in_stays_though_the_next_step_does_not_need_it() -> None:
    """What was named stays named."""
    one = disk()
    cache = ExpertCache(4, 2, one)
    cache.prepare(0.0, 0, [0])
    cache.move_in(0.0, 0, [1])
    assert not cache.is_settled(A) and not cache.is_settled(B)
    cache.step(0.5, 0, [0])
    assert cache.is_settled(A)
    assert B in cache and sorted(cache.held_in(0)) == [0, 1]
    assert cache.step(9.0, 0, [1]) == [9.0] and one.num_reads == 2
