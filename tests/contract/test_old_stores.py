"""Stores whose manifests earlier versions wrote are served as they were.

old_stores/ holds a checkpoint and what `index` and `pack` wrote of it in manifest formats 1 and 2.

Planted faults seen red: format 1 refused, a fingerprint that counts variants where there are none,
a packed record laid out otherwise than before.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from compute_node.engine.sequence import SequenceState
from expert_store.manifest.manifest import MANIFEST_NAME, Manifest
from expert_store.offline.index import index
from expert_store.offline.pack import pack
from expert_store.offline.verify import verify
from tests.contract.test_exactness import STEPS, decode_eagerly, eager_model, engine, prompt

OLD = Path(__file__).parent / "old_stores"
NAMES = ["index-1", "index-2", "pack-1", "pack-2", "pack-2-int8"]


def old_manifest(name: str) -> dict[str, object]:
    document: dict[str, object] = json.loads((OLD / f"{name}.json").read_bytes())
    return document


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """With the time that the manifests over it have."""
    root = tmp_path / "checkpoint"
    shutil.copytree(OLD / "checkpoint", root)
    [[name, _, mtime_ns, _]] = old_manifest("index-1")["files"]  # type: ignore[misc]
    os.utime(root / name, ns=(mtime_ns, mtime_ns))
    return root


def made_now(name: str, root: Path, store_dir: Path) -> Manifest:
    kind, _, *weight_format = name.split("-")
    if kind == "index":
        return index(root, store_dir)
    return pack(root, store_dir, weight_format=(weight_format or ["exact"])[0])


@pytest.fixture(params=NAMES)
def old_store(request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path) -> Path:
    """An old manifest beside records that are packed now."""
    made_now(request.param, checkpoint, tmp_path / "store")
    shutil.copyfile(OLD / f"{request.param}.json", tmp_path / "store" / MANIFEST_NAME)
    return tmp_path / "store"


@pytest.mark.parametrize("name", NAMES)
def test_they_are_of_the_format_that_they_stand_for(name: str) -> None:
    assert old_manifest(name)["version"] == int(name.split("-")[1])


def test_every_byte_is_where_it_was(old_store: Path) -> None:
    assert verify(old_store) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_store_made_now_is_the_same_model(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """Evidence, advice and calibrations go by the fingerprint."""
    now = made_now(name, checkpoint, tmp_path / "store")
    old = Manifest.parse(old_manifest(name), name)
    assert (now.spec, now.records) == (old.spec, old.records)


@pytest.mark.parametrize("old_store", [name for name in NAMES if "int8" not in name], indirect=True)
def test_tokens_are_those_of_the_checkpoint(old_store: Path, checkpoint: Path) -> None:
    expected = decode_eagerly(eager_model(checkpoint, torch.bfloat16), STEPS)[1]
    with engine(old_store, old_store.parent, spare=1) as node:
        sequence = SequenceState("s", prompt())
        logits = node.prefill(sequence)
        for _ in range(STEPS):
            sequence.token_ids.append(int(logits.argmax()))
            [logits] = node.decode([sequence])
    assert len(set(expected[len(prompt()) :])) > 8, "degenerate text proves nothing"
    assert sequence.token_ids == expected
