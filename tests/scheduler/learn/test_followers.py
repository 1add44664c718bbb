from __future__ import annotations

import numpy as np
import pytest

from scheduler.learn import followers
from scheduler.learn.followers import PRIOR, Followers


def used(*experts: int) -> np.ndarray:
    mask = np.zeros((2, 4), np.bool_)
    mask[0, list(experts)] = True
    return mask


def test_counts_who_follows_whom() -> None:
    """Red when layers are mixed up, who and whom are turned, or the prior is left out."""
    table = Followers(2, 4)
    table.learn(np.array([[0, 1], [0, 1]]), used(2, 3))
    table.learn(np.array([[0, 2], [0, 1]]), used(2, 1))
    after_0 = np.array([0, 1, 2, 1]) / (2 + PRIOR)
    after_3 = np.zeros(4)
    shares = table.shares(np.array([[0, 3], [0, 3]]))
    assert shares[0] == pytest.approx((after_0 + after_3) / 2)
    assert shares[1].tolist() == [0, 0, 0, 0]


def test_old_pairs_are_forgotten() -> None:
    """Red when the rate falls for ever."""
    table = Followers(2, 4)
    chosen = np.array([[0], [0]])
    for expert in [1] * 300 + [2] * 300:
        table.learn(chosen, used(expert))
    shares = table.shares(chosen)[0]
    assert shares[2] > 0.9
    assert shares[1] < 0.1


def test_a_table_too_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when memory grows with the square of the experts, whatever their number."""
    monkeypatch.setattr(followers, "MAX_BYTES", 2 * 4 * 4 * 4 - 1)
    table = Followers(2, 4)
    chosen = np.array([[0], [0]])
    table.learn(chosen, used(1))
    assert not table.is_kept
    assert table.shares(chosen).tolist() == [[0.0] * 4] * 2
