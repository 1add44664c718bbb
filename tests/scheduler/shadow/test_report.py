"""What the shadows of a node say, as the scheduler shows it."""

from __future__ import annotations

import pytest

from proto import stats
from proto.stats import Stats
from scheduler.policy.hedged import FIRST, LED, PINNED, STEADY, Reason
from scheduler.shadow.shadows import Report, Score

REPORT = Report(
    node="node-a",
    slots=96,
    scope="pool",
    steps=1200,
    in_charge="lfru",
    reason=Reason(LED, "decayed", 0.021, 87, 1113),
    switches=3,
    policies={"lfru": Score(0.81, 0.82, 0.08), "min": Score(0.88, 0.9, 0.0)},
    actual=Score(0.79, 0.8, 0.1),
)


def test_it_is_shown_in_full() -> None:
    """Red when a policy, MIN or the node's own cache is left out, or one's figure is another's."""
    shown = Stats.from_pb(stats.snapshot(*REPORT.sources()))
    assert shown.of(node="node-a").document() == {
        "slots": 96,
        "scope": "pool",
        "steps": 1200,
        "in_charge": "lfru",
        "switches": 3,
        "why": "led decayed of late, by 2.10 points in 87 steps, at step 1113",
        "hit_ratio{policy=lfru}": 0.81,
        "windowed_hit_ratio{policy=lfru}": 0.82,
        "windowed_regret{policy=lfru}": 0.08,
        "hit_ratio{policy=min}": 0.88,
        "windowed_hit_ratio{policy=min}": 0.9,
        "windowed_regret{policy=min}": 0.0,
        "hit_ratio{policy=actual}": 0.79,
        "windowed_hit_ratio{policy=actual}": 0.8,
        "windowed_regret{policy=actual}": 0.1,
        "is_in_charge{policy=lfru}": 1,
    }


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (Reason(FIRST), "no other has led it yet"),
        (Reason(PINNED), "configured"),
        (
            Reason(STEADY, "lru", 0.0041, 2048, 9),
            "led lru over the long run, by 0.41 points in 2048 steps, at step 9",
        ),
    ],
)
def test_a_reason_is_a_sentence(reason: Reason, text: str) -> None:
    assert str(reason) == text
