"""Evidence and advice survive Redis; whatever else lies there is refused with one error.

Planted faults seen red: `_array` without its size check, ids not compared with num_experts, weights
not checked for NaN, a lifetime of NaN accepted, scores above 1 accepted, `_number` by int() alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto import errors, redis_schema
from proto.redis_schema import Advice, DecodeAccess, PrefillAccess, decode_access

u63 = st.integers(0, (1 << 63) - 1)
names = st.text(st.characters(codec="utf-8"), max_size=40)
seeds = st.integers(0, 1 << 30)


@st.composite
def decode_accesses(draw: st.DrawFn) -> DecodeAccess:
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    num_experts = draw(st.integers(shape[1], 70))
    random = np.random.default_rng(draw(seeds))
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
    )


@st.composite
def prefill_accesses(draw: st.DrawFn) -> PrefillAccess:
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    counts = np.random.default_rng(draw(seeds)).integers(0, 1 << 32, shape).astype(np.uint32)
    return PrefillAccess(draw(names), draw(names), draw(u63), draw(u63), counts)


@st.composite
def advices(draw: st.DrawFn) -> Advice:
    shape = draw(st.none() | st.tuples(st.integers(1, 4), st.integers(1, 9)))
    random = np.random.default_rng(draw(seeds))
    scores = None if shape is None else random.random(shape).astype(np.float32)
    lifetime_s = draw(st.floats(0, 1e9, exclude_max=True))
    return Advice(draw(names), draw(u63), draw(u63), lifetime_s, scores)


def over_the_wire(fields: redis_schema.Fields) -> dict[bytes, bytes]:
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


@settings(deadline=None)
@given(advices())
def test_advice_returns_as_it_went(advice: Advice) -> None:
    assert same(Advice.decode(advice.encode()), advice)


values = st.binary(max_size=300) | st.sampled_from(
    b" -1 +1 1.5 nan 1e3 65537 4097 0 decode prefill \xd9\xa1 \xff\xfe".split(b" ")
)


@settings(deadline=None, max_examples=400)
@given(decode_accesses() | prefill_accesses(), st.data())
def test_mutated_evidence_is_refused_or_sound(
    access: DecodeAccess | PrefillAccess, data: st.DataObject
) -> None:
    fields = over_the_wire(access.encode())
    name = data.draw(st.sampled_from(sorted(fields)))
    if data.draw(st.booleans(), "remove"):
        del fields[name]
    else:
        fields[name] = data.draw(values)
    check_sound(fields)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([b"v", b"kind", b"layers", b"k", b"ids"]), values))
def test_random_evidence_is_refused(fields: dict[bytes, bytes]) -> None:
    with pytest.raises(errors.MessageInvalid):
        decode_access(fields)


def check_sound(fields: dict[bytes, bytes]) -> None:
    try:
        found = decode_access(fields)
    except errors.MessageInvalid:
        return
    if isinstance(found, PrefillAccess):
        assert found.token_counts.nbytes == len(fields[b"counts"])
        return
    assert found.topk_ids.shape == found.topk_weights.shape == found.hits.shape
    assert not found.topk_ids.size or found.topk_ids.max() < found.num_experts
    assert np.isfinite(found.topk_weights).all()


@settings(deadline=None, max_examples=400)
@given(advices(), st.data())
def test_mutated_advice_is_refused_or_sound(advice: Advice, data: st.DataObject) -> None:
    encoded = bytearray(advice.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    check_advice(bytes(encoded[: data.draw(st.integers(0, len(encoded)))]))
    check_advice(bytes(encoded))


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_random_advice_is_refused_or_sound(data: bytes) -> None:
    check_advice(data)


def check_advice(data: bytes) -> None:
    try:
        found = Advice.decode(data)
    except errors.MessageInvalid:
        return
    assert 0 <= found.lifetime_s < 1e9
    assert found.scores is None or bool(((found.scores >= 0) & (found.scores <= 1)).all())


@pytest.mark.parametrize("lifetime_s", [float("nan"), float("inf"), -1.0, 1e9])
def test_impossible_lifetimes_are_refused(lifetime_s: float) -> None:
    with pytest.raises(errors.MessageInvalid, match="lifetime"):
        Advice.decode(Advice("lru", 1, 1, lifetime_s).encode())


@pytest.mark.parametrize("score", [np.nan, np.inf, -0.001, 1.001])
def test_impossible_scores_are_refused(score: float) -> None:
    scores = np.full((2, 3), score, np.float32)
    with pytest.raises(errors.MessageInvalid, match="scores"):
        Advice.decode(Advice("learned", 1, 1, 1.0, scores).encode())


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


def test_advice_is_fresh_for_its_lifetime() -> None:
    advice = Advice("lru", 1, 1_000_000_000, 2.0)
    assert advice.is_fresh(3_000_000_000)
    assert not advice.is_fresh(3_000_000_001)


@given(st.integers(0, 1 << 40))
def test_the_stream_stays_within_its_budget(entry_bytes: int) -> None:
    length = redis_schema.access_stream_maxlen(entry_bytes)
    assert length >= 64
    assert length == 64 or length * entry_bytes <= redis_schema.ACCESS_STREAM_BYTES


def test_models_and_nodes_have_keys_of_their_own() -> None:
    assert redis_schema.access_stream("a") != redis_schema.access_stream("b")
    keys = {redis_schema.advice_key(model, node) for model in "ab" for node in "xy"}
    assert len(keys) == 4
