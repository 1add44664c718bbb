"""What guesses were worth: by predictor and layers ahead, of misses.

Planted faults seen red: a hit counted as a right guess, a second predictor given the recall, a
repeated guess counted twice, a retracted guess left open, guesses of another layer closed.
"""

from __future__ import annotations

from compute_node.predict.foresight import Foresight
from proto import stats
from proto.expert import ExpertKey
from proto.stats import Stats, labelled


def keys(*experts: int, layer: int = 3) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in experts]


def worths(foresight: Foresight) -> dict[tuple[str, int], tuple[int, int, int]]:
    """Right, wrong, and first, by predictor and distance."""
    return {
        (name, distance): (worth.right, worth.wrong, worth.first)
        for name, distance, worth in foresight.worths()
    }


def test_the_first_who_names_a_miss_gets_the_recall_and_all_get_the_precision() -> None:
    foresight = Foresight()
    assert foresight.guessed(*keys(1), "map", 2)
    assert not foresight.guessed(*keys(1), "run_ahead", 1)
    assert foresight.guessed(*keys(2), "run_ahead", 1)
    settled = foresight.settle(3, used=keys(1, 2, 5), misses=keys(1, 2, 5))
    assert settled.foreseen == set(keys(1, 2))
    assert settled.num_unforeseen == 1
    assert worths(foresight) == {("map", 2): (1, 0, 1), ("run_ahead", 1): (2, 0, 1)}
    assert foresight.worth("map", 2).recall == 1 / 3
    assert foresight.misses.num_foreseen == 2


def test_a_guess_that_was_resident_by_then_is_wrong_and_nothing_to_withdraw() -> None:
    foresight = Foresight()
    for expert in (1, 2, 3):
        foresight.guessed(*keys(expert), "map", 1)
    settled = foresight.settle(3, used=keys(1, 2), misses=keys(1))
    assert settled.disproved == keys(3)
    assert worths(foresight) == {("map", 1): (1, 2, 1)}
    assert foresight.worth("map", 1).precision == 1 / 3


def test_a_guess_said_again_counts_once_where_it_was_first() -> None:
    foresight = Foresight()
    assert [foresight.guessed(*keys(1), "map", distance) for distance in (2, 2, 1)] == [
        True,
        False,
        False,
    ]
    foresight.settle(3, keys(1), keys(1))
    assert worths(foresight) == {("map", 2): (1, 0, 1)}


def test_what_is_retracted_was_wrong_and_may_be_guessed_again() -> None:
    foresight = Foresight()
    foresight.guessed(*keys(1), "run_ahead", 2)
    foresight.retract(*keys(1))
    foresight.retract(*keys(9))
    assert len(foresight) == 0
    assert foresight.settle(3, keys(1), keys(1)).num_unforeseen == 1
    assert foresight.guessed(*keys(1), "run_ahead", 1)
    assert worths(foresight)["run_ahead", 2] == (0, 1, 0)


def test_guesses_about_other_layers_stay_open() -> None:
    foresight = Foresight()
    foresight.guessed(*keys(1, layer=5), "map", 2)
    foresight.settle(3, keys(1), keys(1))
    assert ExpertKey(5, 1) in foresight


def test_it_is_shown_by_predictor_and_layers_ahead() -> None:
    foresight = Foresight()
    foresight.guessed(*keys(1), "map", 2)
    foresight.settle(3, keys(1, 4), keys(1, 4))
    shown = stats.snapshot(
        foresight.misses,
        *(labelled(w, predictor=name, layers_ahead=n) for name, n, w in foresight.worths()),
    )
    of_map = Stats.from_pb(shown).of(predictor="map", layers_ahead="2")
    assert (of_map.foresight_recall, of_map.foresight_precision) == (0.5, 1.0)
    assert Stats.from_pb(shown).decode_misses == 2
