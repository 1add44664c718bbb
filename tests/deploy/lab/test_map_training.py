"""A router map is learned from what generations showed, and kept where it is better.

Planted faults seen red: the next router's scores not subtracted, no intercept, a rank that is not
kept to, held-out generations learned from, a part kept that is worse, a spool without a bound.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compute_node.predict.next_router import NextRouters
from compute_node.predict.predictor import EMBEDDING
from deploy.lab.map_lessons import MapLessons
from deploy.lab.map_training import MapTraining, fit
from proto.access import RecordedStep
from proto.expert import ModelSpec
from proto.foretold import Foretold

D, E, N, LAYERS, TOP_K = 12, 8, 3, (1, 3, 5), 2
RANDOM = np.random.default_rng(0)
TRUE_MAP, SAID_MAP = RANDOM.normal(size=(2, D, E))


class Spec:
    fingerprint, moe_layers, num_experts, top_k = "a store", LAYERS, E, TOP_K


def step(said_is_truth: bool = False, hidden: np.ndarray | None = None) -> RecordedStep:
    """Routers follow what the layer before saw by `TRUE_MAP`; what was said of them followed what
    was seen by another.
    """
    inputs = RANDOM.normal(size=(len(LAYERS) + 1, D)) if hidden is None else hidden
    truth = inputs[:-1] @ TRUE_MAP + 2.0
    said = np.full((len(LAYERS), N, E), np.nan)
    for place in range(1, len(LAYERS)):
        for ahead in range(place):
            said[place, ahead] = truth[place] if said_is_truth else inputs[place - ahead] @ SAID_MAP
    halves = [array.astype(np.float16) for array in (said, truth, inputs)]
    foretold = Foretold({NextRouters.name: halves[0]}, *halves[1:])
    ids = np.zeros((len(LAYERS), TOP_K), np.uint16)
    return RecordedStep(E, ids, ids.astype(np.float16), None, foretold)


def with_another_predictor(one: RecordedStep) -> RecordedStep:
    assert one.foretold is not None
    said = {**one.foretold.scores, "map": one.foretold.scores[NextRouters.name]}
    return replace(one, foretold=replace(one.foretold, scores=said))


def lessons(folder: Path, generations: int = 20, steps: int = 30, **how: bool) -> MapLessons:
    filled = MapLessons(folder)
    for _ in range(generations):
        filled.add([step(**how) for _ in range(steps)])
    return filled


def trained(filled: MapLessons) -> MapTraining:
    return MapTraining(Spec, filled)  # type: ignore[arg-type]


def test_it_learns_how_routers_follow_what_was_seen(tmp_path: Path) -> None:
    training = trained(lessons(tmp_path))
    router_map = training.run()
    assert router_map is not None
    assert router_map.parts.keys() == {EMBEDDING, 1, 3}
    assert router_map.parts[EMBEDDING].layers == (1,), "further ahead nothing can be known"
    assert training.embedding[1] > 0.9
    near = training.verdicts[1]
    assert near.mapped / near.layers > 0.9 > 0.5 > near.plain / near.layers
    assert router_map.trained_steps == 18 * 30, "every tenth generation is held out"
    assert any("1 ahead: next router" in line for line in training.report())


def test_where_the_next_router_is_right_there_is_no_map(tmp_path: Path) -> None:
    """Said of every layer what it gave: nothing can be better. The embedding's is left."""
    training = trained(lessons(tmp_path, said_is_truth=True))
    router_map = training.run()
    assert router_map is not None and router_map.parts.keys() == {EMBEDDING}
    assert [verdict.kept for verdict in training.verdicts.values()] == [0, 0]


@pytest.mark.parametrize(("generations", "steps"), [(1, 100), (4, 10)])
def test_too_little_teaches_nothing(tmp_path: Path, generations: int, steps: int) -> None:
    assert trained(lessons(tmp_path, generations, steps)).run() is None


def test_layers_without_a_recognised_stream_have_no_part(tmp_path: Path) -> None:
    filled = MapLessons(tmp_path)
    for _ in range(20):
        rows = RANDOM.normal(size=(30, len(LAYERS) + 1, D))
        given = [step(hidden=row) for row in rows]
        for one in given:
            assert one.foretold is not None and one.foretold.inputs is not None
            one.foretold.inputs[2] = np.nan
        filled.add(given)
    router_map = trained(filled).run()
    assert router_map is not None and router_map.parts.keys() == {EMBEDDING, 1}


def test_a_router_that_is_not_recognised_costs_its_own_target_alone(tmp_path: Path) -> None:
    """Red: layers before it have no part, because one of what comes after them cannot be asked."""
    filled = MapLessons(tmp_path)
    for _ in range(20):
        rows = RANDOM.normal(size=(30, len(LAYERS) + 1, D))
        rows[:, 1] = rows[:, 0]  # so that the second and third can be foretold from the embedding
        rows[:, 2] = rows[:, 0]
        given = [step(hidden=row) for row in rows]
        for one in given:
            assert one.foretold is not None
            one.foretold.truth[1] = np.nan
        filled.add(given)
    training = trained(filled)
    router_map = training.run()
    assert router_map is not None
    found = {layer: part.layers for layer, part in router_map.parts.items()}
    assert found == {EMBEDDING: (1, 5), 1: (5,), 3: (5,)}
    assert training.embedding.keys() == {1, 3}
    assert {ahead: verdict.layers for ahead, verdict in training.verdicts.items()} == {1: 1, 2: 1}


def test_what_no_held_out_step_shows_is_not_kept(tmp_path: Path) -> None:
    """Red: an IndexError, where the stream was not recognised in just the generations held out."""
    filled = MapLessons(tmp_path)
    for generation in range(20):
        given = [step() for _ in range(30)]
        if generation % 10 == 9:
            for one in given:
                assert one.foretold is not None and one.foretold.inputs is not None
                one.foretold.inputs[:] = np.nan
        filled.add(given)
    training = trained(filled)
    assert training.run() is None and not list(training.report())


def test_lessons_are_bounded(tmp_path: Path) -> None:
    """By what is kept. Red when what another predictor said is charged, too."""
    step_bytes = 2 * ((len(LAYERS) + 1) * D + len(LAYERS) * E + len(LAYERS) * N * E)
    filled = MapLessons(tmp_path, most_bytes=5 * step_bytes)
    for _ in range(3):
        filled.add([with_another_predictor(step()) for _ in range(3)])
    assert (filled.num_steps, filled.num_left_out, filled.num_generations) == (5, 4, 2)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == filled.most_bytes


def test_steps_without_what_is_read_are_passed_over(tmp_path: Path) -> None:
    filled = MapLessons(tmp_path)
    filled.add([RecordedStep(E, np.zeros((3, 2), np.uint16), np.zeros((3, 2), np.float16))])
    assert filled.num_generations == 0
    assert trained(filled).run() is None


def test_the_rank_is_kept_to_and_full_rank_is_plain_ridge() -> None:
    read = RANDOM.normal(size=(400, D)).astype(np.float32)
    wanted = (read @ RANDOM.normal(size=(D, N * E)) + 3).astype(np.float32).reshape(-1, N, E)
    low, full = fit(read, wanted, 2), fit(read, wanted, D)
    assert low.down.shape == (2, D) and low.up.shape == (N, E, 2)
    centred = read - read.mean(0)
    square = centred.T @ centred / 400 + 0.1 * np.eye(D)
    ridge = np.linalg.solve(square, centred.T @ (wanted - wanted.mean(0)).reshape(400, -1) / 400)
    expected = (centred @ ridge).reshape(-1, N, E) + wanted.mean(0)
    np.testing.assert_allclose(full.corrections(read), expected, atol=1e-3)


def test_a_spec_of_the_contract_is_read() -> None:
    """`Spec` above has what is read of a `ModelSpec`, under its names."""
    fields = set(ModelSpec.__dataclass_fields__)
    assert {name for name in vars(Spec) if name[0] != "_"} <= fields
