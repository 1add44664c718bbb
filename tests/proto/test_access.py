"""Evidence survives Redis, a recorded step gRPC; whatever else lies there is refused with one
error.

Planted faults seen red: `_array` without its size check, ids not compared with num_experts, weights
not checked for NaN, a step of 2^64 - 1 accepted, a name of any length accepted.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto import access_pb2 as pb
from proto import errors
from proto.access import DecodeAccess, PrefillAccess, RecordedStep, decode_access
from proto.redis_schema import VERSION, Fields

u63 = st.integers(0, (1 << 63) - 1)
names = st.text(st.characters(codec="utf-8"), max_size=40)
seeds = st.integers(0, 1 << 30)


@st.composite
def decode_accesses(draw: st.DrawFn) -> DecodeAccess:
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    num_experts = draw(st.integers(shape[1], 70))
    seed = draw(seeds)
    random = np.random.default_rng(seed)
    shuffled = random.random((shape[0], num_experts)).argsort(axis=1)
    return DecodeAccess(
        node=draw(names),
        sequence=draw(names),
        step=draw(u63),
        num_experts=num_experts,
        slots=draw(u63),
        scope=draw(st.sampled_from(["layer", "pool"])),
        policy=draw(names),
        time_ns=draw(u63),
        topk_ids=shuffled[:, : shape[1]].astype(np.uint16),
        topk_weights=random.normal(0, 3, shape).astype(np.float16),
        hits=random.random(shape) < 0.5,
        gates=random.random((shape[0], num_experts)).astype(np.float16) if seed % 2 else None,
    )


@st.composite
def prefill_accesses(draw: st.DrawFn) -> PrefillAccess:
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    counts = np.random.default_rng(draw(seeds)).integers(0, 1 << 32, shape).astype(np.uint32)
    return PrefillAccess(draw(names), draw(names), draw(u63), draw(u63), counts)


def over_the_wire(fields: Fields) -> dict[bytes, bytes]:
    """What a Redis client hands back for the fields of an entry."""
    return {_bytes(name): _bytes(value) for name, value in fields.items()}


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(one)
    )


@settings(deadline=None)
@given(decode_accesses() | prefill_accesses())
def test_evidence_returns_as_it_went(access: DecodeAccess | PrefillAccess) -> None:
    assert same(decode_access(over_the_wire(access.encode())), access)


@st.composite
def recorded_steps(draw: st.DrawFn) -> RecordedStep:
    access = draw(decode_accesses())
    random = np.random.default_rng(draw(seeds))
    scores = random.normal(0, 3, (len(access.topk_ids), access.num_experts)).astype(np.float16)
    scored = scores if draw(st.booleans()) else None
    return RecordedStep(access.num_experts, access.topk_ids, access.topk_weights, scored)


@settings(deadline=None)
@given(recorded_steps())
def test_a_recorded_step_returns_as_it_went(step: RecordedStep) -> None:
    found = RecordedStep.from_pb(pb.StepAccess.FromString(step.to_pb().SerializeToString()))
    assert same(found, step)


@settings(deadline=None, max_examples=400)
@given(decode_accesses() | prefill_accesses(), st.data())
def test_mutated_evidence_is_refused_or_sound(
    access: DecodeAccess | PrefillAccess, data: st.DataObject
) -> None:
    """Bytes of the message."""
    fields = over_the_wire(access.encode())
    encoded = bytearray(fields[b"access"])
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    check_sound({**fields, b"access": bytes(encoded)})
    check_sound({**fields, b"access": bytes(encoded[: data.draw(st.integers(0, len(encoded)))])})


counts = st.sampled_from([0, 1, 2, 3, 1025, 4097, 65_537, (1 << 32) - 1])


@settings(deadline=None, max_examples=400)
@given(decode_accesses(), counts, st.binary(max_size=300), st.data())
def test_a_field_of_another_kind_of_step_is_refused_or_sound(
    access: DecodeAccess, count: int, content: bytes, data: st.DataObject
) -> None:
    """A size or an array of its own choice."""
    evidence = pb.Evidence.FromString(access.encode()["access"])
    step = evidence.decode.access
    plain = [f.name for f in step.DESCRIPTOR.fields if f.message_type is None]
    name = data.draw(st.sampled_from(sorted(plain)))
    is_size = isinstance(getattr(step, name), int)
    setattr(step, name, count if is_size else content)
    check_sound(entry(evidence))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "another version"),
        ({b"v": b"2", b"kind": b"decode"}, "another version"),
        ({b"v": b"3.0"}, "another version"),
        ({b"v": b"%d" % VERSION}, "unknown kind"),
        ({b"v": b"%d" % VERSION, b"access": b"\xff\xfe"}, "no message"),
        ({b"v": b"%d" % VERSION, b"access": b"\x0a\x02\xff\xfe"}, "no message"),
    ],
)
def test_what_is_no_evidence_is_refused(fields: dict[bytes, bytes], message: str) -> None:
    """Entries of protocol 2 among them, and a name that is not text."""
    with pytest.raises(errors.MessageInvalid, match=message):
        decode_access(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"node": "n" * 257}, "'node' has 257 bytes"),
        ({"sequence": "\u00e9" * 129}, "'sequence' has 258 bytes"),
        ({"policy": "p" * 257}, "'policy' has 257 bytes"),
        ({"step": (1 << 64) - 1}, "'step' is"),
        ({"slots": (1 << 64) - 1}, "'slots' is"),
        ({"time_ns": (1 << 64) - 1}, "'time_ns' is"),
        ({"num_experts": 65_537}, "'num_experts' is 65537"),
        ({"topk_ids": np.zeros((4097, 1), np.uint16)}, "'num_layers' is 4097"),
        ({"topk_ids": np.zeros((1, 1025), np.uint16)}, "'top_k' is 1025"),
        ({"topk_weights": np.zeros((1, 2), np.float16)}, "'topk_weights' has 4 bytes"),
        ({"hits": np.zeros((3, 3), bool)}, "'hits' has the wrong size"),
        ({"gates": np.zeros((1, 3), np.float16)}, "'gates' has 6 bytes"),
        ({"gates": np.full((1, 4), 1.5, np.float16)}, "gates are no shares"),
        ({"gates": np.full((1, 4), -0.5, np.float16)}, "gates are no shares"),
        ({"gates": np.full((1, 4), np.nan, np.float16)}, "gates are no shares"),
    ],
)
def test_a_step_that_no_node_has_is_refused(change: dict[str, Any], message: str) -> None:
    ids, weights = np.zeros((1, 1), np.uint16), np.ones((1, 1), np.float16)
    hits = np.ones((1, 1), bool)
    access = DecodeAccess("n", "s", 0, 4, 1, "layer", "lru", 0, ids, weights, hits)
    changed = dataclasses.replace(access, **change)
    with pytest.raises(errors.MessageInvalid, match=message):
        decode_access(over_the_wire(changed.encode()))


def entry(evidence: pb.Evidence) -> dict[bytes, bytes]:
    return {b"v": b"%d" % VERSION, b"access": evidence.SerializeToString()}


def check_sound(fields: dict[bytes, bytes]) -> None:
    try:
        found = decode_access(fields)
    except errors.MessageInvalid:
        return
    if isinstance(found, PrefillAccess):
        assert found.token_counts.ndim == 2
        return
    assert found.topk_ids.shape == found.topk_weights.shape == found.hits.shape
    assert not found.topk_ids.size or found.topk_ids.max() < found.num_experts
    assert np.isfinite(found.topk_weights).all()


@pytest.mark.parametrize("weight", [np.nan, np.inf])
def test_weights_must_be_finite(weight: float) -> None:
    ids = np.zeros((1, 1), np.uint16)
    hits = np.zeros((1, 1), bool)
    access = DecodeAccess(
        "n", "s", 0, 1, 1, "layer", "lru", 0, ids, np.full((1, 1), weight, np.float16), hits
    )
    with pytest.raises(errors.MessageInvalid, match="finite"):
        decode_access(over_the_wire(access.encode()))


def test_an_expert_named_twice_in_a_layer_is_refused() -> None:
    """Red when it is not looked at: shadows would count one slot twice."""
    ids, weights = np.array([[1, 2], [3, 3]], np.uint16), np.ones((2, 2), np.float16)
    hits = np.ones((2, 2), bool)
    access = DecodeAccess("n", "s", 0, 4, 4, "layer", "lru", 0, ids, weights, hits)
    with pytest.raises(errors.MessageInvalid, match="twice"):
        decode_access(over_the_wire(access.encode()))


def test_an_unknown_scope_is_refused() -> None:
    """Red when the scope is taken as it comes: shadows would count under another budget."""
    ids, weights = np.zeros((1, 1), np.uint16), np.ones((1, 1), np.float16)
    access = DecodeAccess("n", "s", 0, 4, 1, "both", "lru", 0, ids, weights, np.ones((1, 1), bool))
    with pytest.raises(errors.MessageInvalid, match="scope 'both'"):
        decode_access(over_the_wire(access.encode()))


def test_experts_beyond_the_model_are_refused() -> None:
    ids, weights = np.full((1, 1), 4, np.uint16), np.ones((1, 1), np.float16)
    access = DecodeAccess("n", "s", 0, 4, 1, "layer", "lru", 0, ids, weights, np.ones((1, 1), bool))
    with pytest.raises(errors.MessageInvalid, match="does not have"):
        decode_access(over_the_wire(access.encode()))
