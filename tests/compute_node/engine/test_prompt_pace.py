"""Planted faults seen red: a layer's portions from the latest portion alone, time of answers held
against the prompt.
"""

from __future__ import annotations

import pytest

from compute_node.engine.prompt_pace import PromptPace


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_layer_that_takes_long_is_cut_so_that_each_portion_takes_half_of_the_longest_stall() -> (
    None
):
    clock = Clock()
    pace = PromptPace(0.5, clock)
    pace.begin()
    assert pace.num_portions() == 1, "nothing is known yet"
    clock.now_s += 1.1
    pace.end_portion()
    assert pace.is_due and pace.held_s == pytest.approx(1.1)
    pace.end()
    assert pace.num_portions() == 5
    for _ in range(5):
        clock.now_s += 7  # answers have their turns
        pace.begin()
        clock.now_s += 0.22
        pace.end_portion()
    assert pace.num_portions() == 5
    clock.now_s += 0.001
    pace.end_portion()
    assert pace.num_portions() == 1


def test_answers_have_turns_before_prompts_hold_the_thread_too_long() -> None:
    clock = Clock()
    pace = PromptPace(0.5, clock)
    pace.begin()
    due_s = []
    for _ in range(20):
        clock.now_s += 0.125
        pace.end_portion()
        if pace.is_due:
            due_s.append(pace.held_s)
            pace.end()
    assert due_s == [0.375] * 6
