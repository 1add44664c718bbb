"""A node reads its correction from the forecaster's file, or says what is wrong with it.

Planted faults seen red: a file of another store taken, a weight that is not finite taken.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from proto.correction import Correction, corrected, load, shapes
from proto.errors import ForecasterInvalid

SHAPE, WIDTH = (2, 6), 3
SPEC = {"fingerprint": "f00d", "num_layers": 2, "num_experts": 6, "correction_width": WIDTH}


def written(path: Path, damage: Callable[..., None] = lambda tensors, spec: None) -> Correction:
    draw = np.random.default_rng(0).standard_normal
    sizes = shapes(*SHAPE, WIDTH)
    tensors: dict[str, Any] = {name: draw(size).astype("f4") for name, size in sizes.items()}
    kept, spec = Correction.of(tensors), dict(SPEC)
    tensors["gru.state"] = np.zeros(3, np.float32)
    damage(tensors, spec)
    save_file(tensors, path, {"spec": json.dumps(spec)})
    return kept


def test_survives_the_disk(tmp_path: Path) -> None:
    kept = written(tmp_path / "f")
    loaded = load(tmp_path / "f", "f00d", SHAPE)
    for name, tensor in kept.tensors().items():
        np.testing.assert_array_equal(loaded.tensors()[name], tensor)


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, spec: tensors["correction.bias"].fill(np.nan),
        lambda tensors, spec: tensors.pop("correction.pairs"),
        lambda tensors, spec: tensors.update({"correction.more": np.zeros(1, np.float32)}),
        lambda tensors, spec: spec.update(correction_width=4),
        lambda tensors, spec: spec.update(correction_width="wide"),
        lambda tensors, spec: spec.pop("correction_width"),
        lambda tensors, spec: spec.update(fingerprint="another"),
        lambda tensors, spec: spec.update(num_experts=7),
    ],
)
def test_a_wrong_file_is_refused_with_the_remedy(
    tmp_path: Path, damage: Callable[..., None]
) -> None:
    written(tmp_path / "f", damage)
    with pytest.raises(ForecasterInvalid, match="run `flashmoe calibrate` again"):
        load(tmp_path / "f", "f00d", SHAPE)


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xff" * 64)
    with pytest.raises(ForecasterInvalid, match="is damaged"):
        load(tmp_path / "f", "f00d", SHAPE)


def test_odds_of_one_change_nothing_and_scores_stay_in_range() -> None:
    scores = np.linspace(0, 1, 11)
    np.testing.assert_allclose(corrected(scores, np.ones(11)), scores)
    for odds in (1e-20, 1e20):
        moved = corrected(scores, odds)
        assert ((moved >= 0) & (moved <= 1)).all()
    assert corrected(0.5, 3.0) == pytest.approx(0.75)
