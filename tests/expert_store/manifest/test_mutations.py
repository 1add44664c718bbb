"""Manifests with something changed inside: refused with one error, or they still mean the same.

Planted faults seen red: no digest, no check of where tensors lie, an extent beyond its file, dense
weights not compared with their file, `_count` accepting floats, a path with a zero byte, a variant
that lacks an expert, a record larger than a slot.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.manifest.document import signed
from expert_store.manifest.extents import ExpertRecord, plan_reads
from expert_store.manifest.manifest import MANIFEST_NAME, Manifest, check_sources
from expert_store.manifest.sources import resolve_inside
from proto import errors
from tests.expert_store.stores import with_small_variant, write_store


@pytest.fixture(scope="module", params=[False, True], ids=["exact alone", "with a variant"])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    path = tmp_path_factory.mktemp("store")
    write_store(path)
    if request.param:
        with_small_variant(path)
    return path


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return Manifest.load(folder)


@pytest.fixture(scope="module")
def document(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text())
    return loaded


wrong = (
    st.sampled_from(
        [None, True, -1, 0, 1, 0.5, 1.0, float("nan"), float("inf"), 1 << 40, 1 << 63, 1 << 70]
    )
    | st.sampled_from(["", "..", "/etc/passwd", "../../x", "a\0b", "\ud800", "F32", "ff", "-1"])
    | st.sampled_from([[], {}, [[]], [1, 2], {"1": []}, [None] * 5])
    | st.integers()
    | st.text(max_size=10)
)


@st.composite
def mutations(draw: st.DrawFn, document: dict[str, Any]) -> dict[str, Any]:
    """The document with a few values somewhere inside it changed, removed or doubled."""
    mutated = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        parent, name = _somewhere(draw, mutated)
        if parent is None:
            continue
        action = draw(st.sampled_from(["nudge", "change", "remove", "double"]))
        if action == "nudge" and isinstance(parent[name], int):
            parent[name] += draw(st.sampled_from([-64, -1, 1, 64, 4096]))
        elif action in ("nudge", "change"):
            parent[name] = copy.deepcopy(draw(wrong))  # later steps change it in place
        elif action == "remove":
            del parent[name]
        elif isinstance(parent, list):
            parent.append(parent[name])
    return mutated


def _somewhere(draw: st.DrawFn, value: Any) -> tuple[Any, Any]:
    parent, name = None, None
    while isinstance(value, (dict, list)) and value and (parent is None or draw(st.booleans())):
        parent = value
        names = sorted(value) if isinstance(value, dict) else range(len(value))
        name = draw(st.sampled_from(names))
        value = value[name]
    return parent, name


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_changed_manifest_is_refused(
    data: st.DataObject, document: dict[str, Any], manifest: Manifest
) -> None:
    """Red without the digest: swapped offsets of equal tensors would load, and compute nonsense."""
    mutated = data.draw(mutations(document))
    try:
        found = Manifest.parse(mutated, "it")
    except errors.ManifestInvalid as error:
        assert str(error).startswith("it")
        return
    assert found == manifest


@settings(deadline=None, max_examples=500)
@given(data=st.data())
def test_a_wrong_but_signed_manifest_adds_up_or_is_refused(
    data: st.DataObject, document: dict[str, Any], folder: Path
) -> None:
    """What a broken writer would sign: whatever passes can be read without leaving slot or file."""
    try:
        found = Manifest.parse(signed(data.draw(mutations(document))), "it")
    except errors.ManifestInvalid:
        return
    assert set(found.records) == {
        key
        for key in found.records
        if key.expert.layer in found.spec.moe_layers
        and key.expert.expert < found.spec.num_experts
        and (key.variant == "exact" or key.variant in found.spec.variants)
    }
    assert len(found.records) == found.spec.num_experts_total * (1 + len(found.spec.variants))
    for record in found.records.values():
        check_record_fits(found, record)
    check_files_stay_inside(found, folder)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("experts", 0, 3), [64, 64], "overlaps another"),
        (("experts", 0, 3), [0, 8192], "nothing is read"),
        (("experts", 0, 3), [65, 8257], "not aligned"),
        (("experts", 0, 3), [64, 1 << 50], "nothing is read"),
        (("experts", 0, 3), [64], "1 tensors, its layer has 2"),
        (("experts", 0, 3, 0), 64.0, "not a count"),
        (("experts", 0, 2), [], "no extents"),
        (("experts", 0, 2, 0, 0), 1, "file number 1 of 1"),
        (("experts", 0, 2, 0, 1), 1 << 40, "beyond"),
        (("experts", 0, 2, 0, 2), 12287, "differ in size"),
        (("experts", 0, 2, 0, 3), 4096, "place overlaps"),
        (("experts", 0, 4), "-1", "not a count"),
        (("experts", 0, 4), "1" * 17, "not a count"),
        (("experts", 0, 1), 1, "11 experts"),
        (("experts", 0, 1), 6, "no such expert"),
        (("spec", "dense", 0, 4), 1 << 40, "norm reaches beyond"),
        (("spec", "dense", 0, 5), 39, "norm has the wrong size"),
        (("spec", "dense", 0, 3), "other.bin", "other.bin' is not among"),
        (("spec", "dense", 0, 1), "F99", "not a dtype"),
        (("spec", "top_k"), 0, "top_k 0 of 6"),
        (("spec", "top_k"), 7, "top_k 7 of 6"),
        (("spec", "num_experts"), 1 << 40, "experts"),
        (("spec", "moe_layers"), [1], "do not agree"),
        (("spec", "moe_layers"), [], "do not agree"),
        (("files", 0, 0), "a\0b", "not a path"),
        (("files", 0, 0), "\ud800\0", "not a path|surrogates"),
        (("source_root",), "a\0b", "not a path"),
        (("sizing", "dense_bytes"), float("nan"), "not a count"),
        (("format",), 7, "not text"),
    ],
)
def test_what_does_not_add_up_is_named(
    path: tuple[Any, ...], value: Any, reason: str, document: dict[str, Any]
) -> None:
    """Signed, so that each check stands for itself."""
    mutated = copy.deepcopy(document)
    parent: Any = mutated
    for step in path[:-1]:
        parent = parent[step]
    parent[path[-1]] = value
    with pytest.raises(errors.ManifestInvalid, match=reason):
        Manifest.parse(signed(mutated), "it")


def check_record_fits(manifest: Manifest, record: ExpertRecord) -> None:
    variant = manifest.spec.variant(record.key.variant)
    layout = variant.layouts[record.key.expert.layer]
    covered: set[int] = set()
    for read in plan_reads(record.extents):
        extent = read.extent
        end_bytes = extent.offset_bytes + extent.length_bytes
        assert end_bytes <= manifest.files[extent.file].size_bytes
        assert read.landing_bytes + read.aligned_length_bytes <= manifest.slot_bytes
        covered.update(range(extent.place_bytes, extent.place_bytes + extent.length_bytes))
    for offset, tensor in zip(record.tensor_offsets, layout, strict=True):
        assert offset % 64 == 0
        wanted = set(range(offset, offset + tensor.length_bytes))
        assert wanted <= covered, "a tensor lies where nothing is read, or over another one"
        covered -= wanted
    assert not covered


def check_files_stay_inside(manifest: Manifest, folder: Path) -> None:
    try:
        check_sources(manifest, folder)
    except errors.ManifestInvalid:
        return
    assert all(resolve_inside(folder, file.path).is_file() for file in manifest.files)
