"""Value types survive the wire.

Planted faults seen red: (expert, layer) in ExpertKey.to_pb, a DenseTensor without its checksum,
`contains` without its lower bound, a RecordKey that forgets its variant, a ModelSpec that forgets
its variants.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from proto import expert_pb2 as pb
from proto.expert import (
    DTYPE_BYTES,
    DenseTensor,
    ExpertKey,
    ModelSpec,
    RecordKey,
    TensorLayout,
    Variant,
)
from proto.weight_format import WeightFormat

u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
names = st.text(st.characters(codec="utf-8"), max_size=20)
keys = st.builds(ExpertKey, u32, u32)
record_keys = st.builds(RecordKey, keys, st.sampled_from(["exact", "int4"]))
layouts = st.builds(
    TensorLayout,
    names,
    st.sampled_from(sorted(DTYPE_BYTES)),
    st.lists(u32, max_size=4).map(tuple),
)
dense = st.builds(
    DenseTensor, names, names, st.lists(u64, max_size=4).map(tuple), names, u64, u64, u64
)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    layers = draw(st.lists(u32, min_size=1, max_size=4, unique=True).map(sorted))
    return ModelSpec(
        fingerprint=draw(names),
        model_type=draw(names),
        moe_layers=tuple(layers),
        num_experts=draw(u32),
        top_k=draw(u32),
        layouts=draw_layouts(draw, layers),
        dense=draw(st.lists(dense, max_size=3).map(tuple)),
        variants={
            name: Variant(WeightFormat(name, lossy=True), draw_layouts(draw, layers))
            for name in draw(st.lists(st.sampled_from(["int4", "int8"]), unique=True))
        },
    )


def draw_layouts(draw: st.DrawFn, layers: list[int]) -> dict[int, tuple[TensorLayout, ...]]:
    return {layer: draw(st.lists(layouts, max_size=3).map(tuple)) for layer in layers}


@given(keys)
def test_a_key_returns_as_it_went(key: ExpertKey) -> None:
    message = key.to_pb()
    assert (message.layer, message.expert) == (key.layer, key.expert)
    assert ExpertKey.from_pb(message) == key


@given(record_keys)
def test_a_record_key_returns_as_it_went(key: RecordKey) -> None:
    assert RecordKey.from_pb(key.to_pb()) == key


@given(keys)
def test_an_expert_on_the_wire_is_its_exact_record(key: ExpertKey) -> None:
    message = pb.RecordKey.FromString(key.to_pb().SerializeToString())
    assert RecordKey.from_pb(message) == RecordKey(key)


def test_a_record_prints_its_variant_unless_it_is_the_exact_one() -> None:
    assert [str(RecordKey(ExpertKey(7, 113), name)) for name in ("exact", "int4")] == [
        "L07E113",
        "L07E113/int4",
    ]


def test_a_key_prints_layer_first_and_sorts_by_it() -> None:
    assert str(ExpertKey(7, 113)) == "L07E113"
    assert ExpertKey(1, 9) < ExpertKey(2, 0)


@settings(deadline=None, max_examples=50)
@given(specs())
def test_a_model_returns_as_it_went(spec: ModelSpec) -> None:
    assert ModelSpec.from_pb(spec.to_pb()) == spec


@given(specs(), st.integers(-5, 1 << 32), st.integers(-5, 1 << 32))
@settings(deadline=None, max_examples=50)
def test_contains_is_what_the_layers_and_counts_say(
    spec: ModelSpec, layer: int, expert: int
) -> None:
    expected = layer in spec.moe_layers and expert in range(spec.num_experts)
    assert spec.contains(ExpertKey(layer, expert)) == expected
    inside = ExpertKey(spec.moe_layers[0], expert)
    assert spec.contains(inside) == (expert in range(spec.num_experts))


def test_sizes_add_up() -> None:
    layout = (TensorLayout("up", "BF16", (3, 5)), TensorLayout("down", "F32", (7,)))
    weight = DenseTensor("norm", "F32", (10,), "file", 0, 40, 0)
    spec = ModelSpec("f", "toy", (0, 2), 4, 2, {0: layout, 2: layout}, (weight, weight))
    assert (spec.expert_bytes(2), spec.dense_bytes, spec.num_experts_total) == (58, 80, 8)
