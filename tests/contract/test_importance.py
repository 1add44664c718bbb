"""A node that evicts by importance: its bits are as ever, and what it weighs is what it sends.

Planted faults seen red: gates of another layer weighed, gates sent where nothing goes by them, the
first row's gates sent for every sequence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compute_node.cache.policies.importance import Gates
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.evidence.step import Evidence
from compute_node.moe.step import Batch, Keeps, LayerAccess, Part, Phase, Step
from expert_store.manifest.manifest import Manifest
from expert_store.offline.index import index
from proto.access import DecodeAccess, PrefillAccess
from tests.contract.test_exactness import STEPS, Reference, engine, reference, run

Entries = list[DecodeAccess | PrefillAccess]


def sent(root: Path, entries: Entries) -> Evidence:
    class Log:
        append = staticmethod(entries.append)

    return Evidence(Log(), Manifest.load(root).spec, "n", 8, "layer", lambda: "")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def references() -> dict[Any, Reference]:
    return {}


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("policy", ["importance", "decayed"])
def test_bits_are_eagers_and_gates_travel_where_they_are_used(
    policy: str,
    name: str,
    references: dict[Any, Reference],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DeepSeek chooses by corrected scores and by groups: its chosen experts' weights stand for
    gates.
    """
    weighed, entries = list[tuple[int, Gates]](), Entries()
    weigh = PolicyChooser.weigh

    def spy(chooser: PolicyChooser, layer: int, gates: Gates) -> None:
        weighed.append((layer, gates))
        weigh(chooser, layer, gates)

    monkeypatch.setattr(PolicyChooser, "weigh", spy)
    expected = reference(references, name, torch.float32, tmp_path)
    index(expected.root, tmp_path / "store")
    evidence = sent(tmp_path / "store", entries)
    with engine(tmp_path / "store", tmp_path, policy=policy, evidence=evidence) as node:
        logits, tokens = run(node)
        layers = node.loaded.spec.moe_layers
    assert all(torch.equal(a, b) for a, b in zip(logits, expected.logits, strict=True))
    assert tokens == expected.tokens
    steps = [each for each in entries if isinstance(each, DecodeAccess)]
    assert len(steps) == STEPS - 1
    if policy != "importance":
        assert not weighed and all(step.gates is None for step in steps)
        return
    assert [layer for layer, _ in weighed] == list(layers) * STEPS, "the prompt is one step"
    for number, step in enumerate(steps, 1):
        assert step.gates is not None
        assert np.allclose(step.gates.sum(axis=1, dtype=float), 1, atol=0.01)
        at = number * len(layers)
        assert [
            gates.tolist() for _, gates in weighed[at : at + len(layers)]
        ] == step.gates.tolist()
        if name == "mixtral":
            assert (step.gates > 0).all(), "experts that were not chosen have a share, too"


def test_each_sequence_sends_its_own_gates(
    tmp_path: Path, references: dict[Any, Reference]
) -> None:
    root = reference(references, "mixtral", torch.float32, tmp_path).root
    index(root, tmp_path / "store")
    entries = Entries()
    evidence = sent(tmp_path / "store", entries)
    spec = Manifest.load(tmp_path / "store").spec
    parts = [Part(name, Phase.DECODE, 1, 1) for name in ("a", "b")]
    step = Step(Batch(*parts), lambda: None, Keeps(gates=True))
    ids = torch.arange(spec.top_k).repeat(2, 1)
    assert step.gates is not None
    for layer in spec.moe_layers:
        step.accesses[layer] = LayerAccess(ids, torch.ones(2, spec.top_k), set())
        gates = torch.zeros(2, spec.num_experts).half()
        gates[0, 0] = gates[1, 1] = 1
        step.gates[layer] = gates
    evidence.append(step)
    best = [e.gates.argmax(axis=1).tolist() for e in entries if isinstance(e, DecodeAccess)]  # type: ignore[union-attr]
    assert best == [[0] * len(spec.moe_layers), [1] * len(spec.moe_layers)]
