"""Who owns what of boxes that are not there yet, where it is known by hand.

Planted faults seen red: costs ignored, no second owners, second owners in a rotation, what no box
has given to the main one.
"""

from __future__ import annotations

from deploy.plan.owners_map import Holder, Model, OwnersMap
from proto.expert import ExpertKey
from proto.held_experts import HeldExperts

MODEL = Model((1, 3, 4), 8, 1e6)
ODD = HeldExperts(frozenset(ExpertKey(layer, e) for layer in MODEL.moe_layers for e in (1, 3, 5)))


def test_shares_are_as_large_as_slots_over_cost() -> None:
    found = OwnersMap.of(MODEL, [Holder("main", 8), Holder("w1", 8), Holder("w2", 32, 2.0)])
    assert [list(one.by_layer) for one in found.boxes] == [[2, 2, 2], [2, 2, 2], [4, 4, 4]]
    assert [(one.experts, one.fitting) for one in found.boxes] == [(6, 6), (6, 6), (12, 12)]
    small = OwnersMap.of(MODEL, [Holder("main", 4), Holder("w1", 4)]).boxes[0]
    assert (small.experts, small.fitting, small.a_layer) == (12, 4, "4")


def test_what_memories_hold_beyond_the_model_goes_twice() -> None:
    """12 experts owned of 18 slots: room for two more of each layer."""
    boxes = [Holder("main", 18), Holder("w1", 18)]
    found = OwnersMap.of(MODEL, boxes, doubles=True)
    assert [one.doubled for one in found.boxes] == [6, 6]
    turns = OwnersMap.of(MODEL, [*boxes, Holder("w2", 24)], "rotation", doubles=True)
    assert [one.doubled for one in turns.boxes] == [0, 0, 0]


def test_layers_of_a_rotation_are_a_groups() -> None:
    boxes = [Holder("main", 8), Holder("w1", 4), Holder("w2", 4), Holder("w3", 4)]
    found = OwnersMap.of(MODEL, boxes, "rotation", num_groups=2)
    assert [list(one.by_layer) for one in found.boxes] == [
        [0, 0, 0],
        [4, 0, 4],
        [0, 8, 0],
        [4, 0, 4],
    ]
    each = OwnersMap.of(MODEL, boxes, "rotation")
    assert [list(one.by_layer) for one in each.boxes][1:] == [[8, 0, 0], [0, 8, 0], [0, 0, 8]]


def test_what_no_box_has_is_named() -> None:
    found = OwnersMap.of(MODEL, [Holder("main", 8, held=ODD), Holder("w1", 8, held=ODD)])
    assert len(found.lacking) == 15 and found.lacking[0] == ExpertKey(1, 0)
    assert sum(one.experts for one in found.boxes) == 9
