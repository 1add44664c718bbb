"""LeCaR: lots between LRU and LFU, and the odds that regret teaches.

Planted faults seen red: regret that raises the odds of who is to blame, a history without end, lots
of no seed.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from scheduler.policy import lecar
from scheduler.policy.lecar import LeCar
from tests.scheduler.replays import recorded


class Lots:
    """In place of random.Random: always the same side."""

    def __init__(self, lot: float) -> None:
        self._lot = lot

    def random(self) -> float:
        return self._lot


BY_LRU, BY_LFU = 0.0, 1.0


@pytest.fixture
def policy() -> LeCar:
    """Three slots."""
    return LeCar(3)


def use(policy: LeCar, keys: Iterable[int], lot: float) -> None:
    policy._lots = Lots(lot)  # type: ignore[assignment]
    for key in keys:
        if key in policy:
            policy.hit(key)
        else:
            policy.miss(key, [key])


def resident(policy: LeCar) -> set[int]:
    return {key for key in range(100) if key in policy}


def test_lru_takes_the_oldest_and_lfu_the_rarest(policy: LeCar) -> None:
    use(policy, [0, 0, 1, 2, 3], BY_LRU)
    assert resident(policy) == {1, 2, 3}
    use(policy, [3, 1, 4], BY_LFU)
    assert resident(policy) == {1, 3, 4}


def test_counts_are_kept_across_evictions(policy: LeCar) -> None:
    use(policy, [0, 0, 0, 1, 1, 2, 2, 3], BY_LRU)
    use(policy, [0, 4], BY_LFU)
    assert resident(policy) == {0, 2, 4}, "0 has four uses, 3 one"


def odds_of_lru(policy: LeCar) -> float:
    return policy._odds_of_lru


def test_regret_lowers_the_odds_of_who_is_to_blame(policy: LeCar) -> None:
    """After LRU gave up 0 and it came back: w_lfu = 0.5 exp(0.45 d^1), normalised."""
    use(policy, [0, 1, 2, 3], BY_LRU)
    use(policy, [0], BY_LRU)
    grown = 0.5 * 2.718281828459045 ** (0.45 * 0.005 ** (1 / 3))
    assert odds_of_lru(policy) == pytest.approx(0.5 / (0.5 + grown))
    other = LeCar(3)
    use(other, [0, 1, 2, 3], BY_LFU)
    use(other, [0], BY_LFU)
    assert odds_of_lru(other) == pytest.approx(grown / (0.5 + grown))


def test_regret_fades(policy: LeCar) -> None:
    use(policy, [0, 1, 2, 3], BY_LRU)
    use(policy, [1, 2, 3] * 20, BY_LRU)
    use(policy, [0], BY_LRU)
    assert odds_of_lru(policy) == pytest.approx(0.5, abs=1e-9)


def test_a_history_is_as_long_as_the_cache(policy: LeCar) -> None:
    use(policy, range(8), BY_LRU)
    before = odds_of_lru(policy)
    use(policy, [0, 1], BY_LRU)
    assert odds_of_lru(policy) == before, "forgotten"
    use(policy, [7, 6, 5, 4], BY_LRU)
    assert odds_of_lru(policy) < before


def test_the_seed_decides_the_lots() -> None:
    trace = recorded()
    missed = []
    for seed in (0, 0, 1):
        policy = LeCar(12, seed)
        count = 0
        for step in trace.topk_ids[:, 0].tolist():
            for key in sorted(step):
                if key in policy:
                    policy.hit(key)
                else:
                    count += 1
                    policy.miss(key, step)
        missed.append(count)
    assert missed[0] == missed[1] != missed[2]


def test_constants_are_the_paper_s() -> None:
    assert (lecar.LEARNING_RATE, lecar.REGRET_AFTER_A_CACHEFUL) == (0.45, 0.005)
