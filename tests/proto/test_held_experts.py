"""Which experts a store has, over the wire.

Written against: bytes of another length taken, bits beyond the last expert taken, the
model's layer numbers taken for places.
"""

from __future__ import annotations

import pytest

from proto import errors
from proto.expert import ExpertKey, ModelSpec
from proto.held_experts import ALL_EXPERTS, HeldExperts

SPEC = ModelSpec("f", "toy", (3, 5), 6, 2, {3: (), 5: ()})


def test_all_are_nothing_on_the_wire() -> None:
    assert ALL_EXPERTS.to_bytes(SPEC) == b""
    assert HeldExperts.from_bytes(b"", SPEC).is_all
    assert ExpertKey(5, 5) in ALL_EXPERTS and ALL_EXPERTS.num(SPEC) == 12


def test_some_are_bits_layer_by_layer() -> None:
    held = HeldExperts(frozenset({ExpertKey(3, 0), ExpertKey(3, 5), ExpertKey(5, 1)}))
    assert held.to_bytes(SPEC) == bytes([0b10100001, 0b0])
    assert HeldExperts.from_bytes(held.to_bytes(SPEC), SPEC) == held
    assert ExpertKey(5, 1) in held and ExpertKey(5, 0) not in held
    assert held.num(SPEC) == 3 and not held.is_all


@pytest.mark.parametrize("data", [bytes(1), bytes(3), bytes([0, 0b10000]), b"\xff" * 1000])
def test_bytes_of_another_size_are_refused(data: bytes) -> None:
    with pytest.raises(errors.MessageInvalid, match="which of 12 experts"):
        HeldExperts.from_bytes(data, SPEC)
