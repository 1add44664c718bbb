"""A router map as a file, and as a predictor.

Planted faults seen red: a map of another model taken, one flipped bit not noticed, a product kept
for what was seen before, the next router's scores left out, the embedding asked of a router.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from compute_node.predict import router_map as module
from compute_node.predict.mapped_routers import MappedRouters, model_input
from compute_node.predict.next_router import NextRouter, NextRouters
from compute_node.predict.predictor import EMBEDDING, Seen
from compute_node.predict.router_map import Part, RouterMap, most_rank
from proto import errors

D, E, R = 6, 4, 2
SEEN = Seen(1, torch.ones(1, D), stream=torch.arange(D)[None] * 1.0, output=torch.ones(1, D))


def part(*layers: int, seed: int = 0) -> Part:
    random = np.random.default_rng(seed)
    outputs = len(layers) * E
    return Part(
        layers,
        random.normal(size=(R, D)).astype(np.float16),
        random.normal(size=(outputs, R)).astype(np.float16),
        random.normal(size=outputs).astype(np.float32),
    )


def made() -> RouterMap:
    every = {EMBEDDING: part(1, 2), 1: part(2, 3, seed=1), 2: part(3, seed=2)}
    return RouterMap("a store", E, D, 1000, every)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made().save(tmp_path / "map.safetensors")
    return tmp_path / "map.safetensors"


def test_what_is_saved_is_loaded(path: Path) -> None:
    loaded, saved = RouterMap.load(path, "a store", E), made()
    assert loaded.parts.keys() == saved.parts.keys()
    assert loaded.trained_steps == 1000
    for layer, one in saved.parts.items():
        assert loaded.parts[layer].layers == one.layers
        for name, tensor in one.tensors().items():
            np.testing.assert_array_equal(loaded.parts[layer].tensors()[name], tensor)


def written_again(path: Path, **metadata: str) -> None:
    """The same tensors under other metadata."""
    with safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        tensors, before = {name: file.get_tensor(name) for name in names}, file.metadata()
    save_file(tensors, path, before | metadata)


def test_a_map_of_another_model_is_refused_in_one_sentence(path: Path) -> None:
    for fingerprint, num_experts in (("another", E), ("a store", E + 1)):
        with pytest.raises(errors.RouterMapInvalid) as caught:
            RouterMap.load(path, fingerprint, num_experts)
        assert str(caught.value) == (
            f"{path} was calibrated for another model or an earlier index: run `flashmoe "
            "calibrate` again, or remove it"
        )


@pytest.mark.parametrize("place", [100, -1], ids=["header", "numbers"])
def test_one_flipped_bit_is_noticed(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.RouterMapInvalid, match="flashmoe calibrate"):
        RouterMap.load(path, "a store", E)


def test_what_is_no_map_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written_again(path, format="flashmoe-router-map-9")
    with pytest.raises(errors.RouterMapInvalid, match="has the format flashmoe-router-map-9"):
        RouterMap.load(path, "a store", E)
    path.write_bytes(b"not a map at all")
    with pytest.raises(errors.RouterMapInvalid, match="is damaged"):
        RouterMap.load(path, "a store", E)
    monkeypatch.setattr(module, "MAX_BYTES", 15)
    with pytest.raises(errors.RouterMapInvalid, match="has 16 bytes, more than 15"):
        RouterMap.load(path, "a store", E)


@pytest.mark.parametrize(
    "wrong",
    [{"up": np.zeros((E, R), np.float16)}, {"bias": np.full(2 * E, np.nan, np.float32)}],
    ids=["shape", "not finite"],
)
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, wrong: dict[str, np.ndarray]) -> None:
    path = tmp_path / "map.safetensors"
    replace(made(), parts={1: replace(part(2, 3), **wrong)}).save(path)
    with pytest.raises(errors.RouterMapInvalid, match="finite numbers"):
        RouterMap.load(path, "a store", E)


def test_vectors_of_another_size_are_refused(path: Path) -> None:
    with pytest.raises(errors.RouterMapInvalid, match="6 numbers, not of the model's 7"):
        made().check_reads(path, D + 1)


def test_a_map_of_a_large_model_stays_within_its_bound() -> None:
    """58 layers of 7,168 and 256 experts: full rank would be over 600 MiB."""
    for hidden, outputs in ((7168, 768), (65_536, 3 * 4096)):
        rank = most_rank(59, hidden, outputs)
        assert rank >= 1
        assert 59 * (2 * rank * (hidden + outputs) + 4 * outputs) < module.MAX_BYTES


def predictor() -> tuple[MappedRouters, NextRouters]:
    routers = NextRouters({layer: NextRouter(torch.eye(E, D), None, None) for layer in (2, 3)})
    return MappedRouters(made(), routers), routers


def by_hand(one: Part, number: int, seen: Seen) -> torch.Tensor:
    read = model_input(seen)
    assert read is not None
    down, up, bias = (torch.from_numpy(each).float() for each in one.tensors().values())
    return (up @ (down @ read[0]) + bias)[number * E : (number + 1) * E]


def test_it_corrects_what_the_next_router_says() -> None:
    mapped, routers = predictor()
    other = replace(SEEN, output=torch.zeros(1, D))
    for seen in (SEEN, other, SEEN):
        for number, layer in enumerate((2, 3)):
            plain = routers.scores(seen, layer)[0]
            expected = plain + by_hand(made().parts[1], number, seen)
            assert torch.allclose(mapped.scores(seen, layer)[0], expected, atol=1e-5)


def test_it_answers_alone_about_an_embedding() -> None:
    mapped, routers = predictor()
    seen = Seen(EMBEDDING, torch.arange(2 * D).view(2, D) * 1.0)
    assert mapped.knows(seen, 2) and not routers.knows(seen, 2)
    for row in range(2):
        alone = by_hand(made().parts[EMBEDDING], 1, replace(seen, hidden=seen.hidden[row, None]))
        assert torch.allclose(mapped.scores(seen, 2)[row], alone, atol=1e-5)


def test_it_knows_what_it_was_trained_on_and_can_see() -> None:
    mapped, _ = predictor()
    assert mapped.knows(SEEN, 2) and mapped.knows(SEEN, 3)
    assert not mapped.knows(replace(SEEN, layer=2), 2), "no part foretells it"
    assert not mapped.knows(replace(SEEN, layer=3), 2)
    assert not mapped.knows(replace(SEEN, output=None), 2), "too early"
    assert not mapped.knows(replace(SEEN, stream=None), 2)
    assert not mapped.knows(Seen(EMBEDDING, SEEN.hidden), 1), "its router cannot be asked"


def test_what_is_read_has_a_root_mean_square_of_one() -> None:
    read = model_input(SEEN)
    assert read is not None
    assert float(read.square().mean()) == pytest.approx(1.0)
    zero = model_input(Seen(EMBEDDING, torch.zeros(1, D)))
    assert zero is not None and torch.equal(zero, torch.zeros(1, D))


def test_the_file_says_what_it_is_for(path: Path) -> None:
    with safe_open(path, framework="numpy") as file:
        spec = json.loads(file.metadata()["spec"])
    assert spec["fingerprint"] == "a store"
    assert spec["parts"] == [[EMBEDDING, 1, 2], [1, 2, 3], [2, 3]]
