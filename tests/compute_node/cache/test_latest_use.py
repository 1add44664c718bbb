"""Planted faults seen red: uses kept after the last answer, the first uses taken for the latest."""

from __future__ import annotations

from compute_node.cache.latest_use import LatestUse
from proto.expert import ExpertKey

KEYS = [ExpertKey(layer, expert) for layer in range(2) for expert in range(3)]


def test_the_latest_uses_are_known_while_answers_are_under_way() -> None:
    uses = LatestUse()
    uses.note(KEYS)
    assert uses.latest(9) == frozenset(), "nobody answers"
    with uses.answering():
        with uses.answering():
            uses.note(KEYS)
            uses.note(KEYS[:1])
        assert uses.latest(9) == frozenset(KEYS)
        assert uses.latest(2) == {KEYS[0], KEYS[5]}
        assert uses.latest(2, layer=0) == {KEYS[0], KEYS[2]}
    assert uses.latest(9) == frozenset()
