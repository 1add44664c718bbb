"""Advice survives Redis; whatever else lies there is refused with one error.

Planted faults seen red: a lifetime of NaN accepted, scores above 1 accepted.
"""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto import errors, redis_schema
from proto.redis_schema import Advice

u63 = st.integers(0, (1 << 63) - 1)
names = st.text(st.characters(codec="utf-8"), max_size=40)
seeds = st.integers(0, 1 << 30)


@st.composite
def advices(draw: st.DrawFn) -> Advice:
    shape = draw(st.none() | st.tuples(st.integers(1, 4), st.integers(1, 9)))
    random = np.random.default_rng(draw(seeds))
    scores = None if shape is None else random.random(shape).astype(np.float32)
    knows_unused = scores is not None and draw(st.booleans())
    unused = random.random(shape).astype(np.float32) if knows_unused else None
    lifetime_s = draw(st.floats(0, 1e9, exclude_max=True))
    return Advice(draw(names), draw(u63), draw(u63), lifetime_s, scores, unused, draw(u63))


@settings(deadline=None)
@given(advices())
def test_advice_returns_as_it_went(advice: Advice) -> None:
    found = Advice.decode(advice.encode())
    for field in dataclasses.fields(advice):
        assert np.array_equal(getattr(found, field.name), getattr(advice, field.name))


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
    for table in (found.scores, found.unused_scores):
        assert table is None or bool(((table >= 0) & (table <= 1)).all())


@pytest.mark.parametrize("shape", [(0, 1 << 31, 1 << 31), (1, 0, 1 << 31), (0, 0, 3)])
def test_a_shape_without_scores_is_refused(shape: tuple[int, int, int]) -> None:
    """Seen red: a product of such sizes is more than numpy can have."""
    data = bytearray(Advice("", 1, 1, 1.0).encode())
    struct.pack_into("<III", data, 8, *shape)
    with pytest.raises(errors.MessageInvalid, match="wrong size"):
        Advice.decode(bytes(data))


@pytest.mark.parametrize("lifetime_s", [float("nan"), float("inf"), -1.0, 1e9])
def test_impossible_lifetimes_are_refused(lifetime_s: float) -> None:
    with pytest.raises(errors.MessageInvalid, match="lifetime"):
        Advice.decode(Advice("lru", 1, 1, lifetime_s).encode())


@pytest.mark.parametrize("score", [np.nan, np.inf, -0.001, 1.001])
def test_impossible_scores_are_refused(score: float) -> None:
    scores = np.full((2, 3), score, np.float32)
    with pytest.raises(errors.MessageInvalid, match="scores"):
        Advice.decode(Advice("learned", 1, 1, 1.0, scores).encode())
    sound = np.zeros((2, 3), np.float32)
    with pytest.raises(errors.MessageInvalid, match="scores"):
        Advice.decode(Advice("learned", 1, 1, 1.0, sound, scores).encode())


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
