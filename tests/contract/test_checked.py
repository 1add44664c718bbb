"""An exact pass beside every token of every architecture: of an exact sequence it gives the very
same logits, of a lossy one it leaves no trace.

Planted faults seen red: the pass on the true state (below, for good), positions made of nothing
(qwen4_exp reads them before its layers).
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compute_node.config import RunAheadSetting
from compute_node.engine.engine import Engine, Finished
from compute_node.engine.exact_pass import ON, ExactPass
from compute_node.engine.request import Request
from compute_node.engine.scoring import ScoredText, score
from compute_node.engine.sequence import SequenceState
from compute_node.moe.route import EXACT, Route, RoutePolicy
from compute_node.quality.divergence import Divergence
from compute_node.quality.guard import Guard
from compute_node.quality.turns import OneRoute, Rung
from compute_node.run_ahead.fork import Fork
from expert_store.offline.index import index
from proto.quality import Budget
from tests.architectures import causal_types, tiny_config
from tests.checkpoints import make, save
from tests.contract.test_every_architecture import REFUSED
from tests.contract.test_exactness import engine, prompt

STEPS = 20


@dataclass(frozen=True)
class WithoutTheLast:
    """Leaves the last of the chosen out, whatever is resident."""

    needs_scores: bool = False
    needs_small: bool = False

    def apply(self, route: Route, resident: Container[int]) -> Route:
        weights = route.weights.clone()
        weights[:, -1] = 0
        return replace(route, weights=weights)


LOSSY = WithoutTheLast()


@contextmanager
def node_of(root: Path, tmp_path: Path, run_ahead: RunAheadSetting = "off") -> Iterator[Engine]:
    index(root, tmp_path / "store")
    with engine(tmp_path / "store", tmp_path, spare=2, run_ahead=run_ahead) as node:
        yield node


def decode(
    node: Engine, policy: RoutePolicy, is_checked: bool
) -> tuple[list[torch.Tensor], list[Divergence]]:
    """Logits of each step, and what checks found."""
    sequence = SequenceState("s", prompt(), policy=policy)
    logits, found = [node.prefill(sequence)], list[Divergence]()
    for _ in range(STEPS):
        sequence.token_ids.append(int(logits[-1].argmax()))
        exact = node.exact_pass.logits(sequence) if is_checked else None
        logits += node.decode([sequence])
        if exact is not None:
            found.append(Divergence.of(exact, logits[-1]))
    return logits, found


def check(node: Engine) -> None:
    plain, _ = decode(node, EXACT, is_checked=False)
    exact, found = decode(node, EXACT, is_checked=True)
    assert all(map(torch.equal, plain, exact))
    assert len(found) == STEPS and set(found) == {Divergence(0.0, True)}
    lossy, _ = decode(node, LOSSY, is_checked=False)
    again, found = decode(node, LOSSY, is_checked=True)
    assert all(map(torch.equal, lossy, again))
    assert len(found) == STEPS and all(one.kl > 0 for one in found)
    assert node.exact_pass.status == ON
    assert (node.exact_pass.num_done, node.exact_pass.num_failed) == (2 * STEPS, 0)


@pytest.mark.parametrize("model_type", sorted({*causal_types()} - {*REFUSED}))
def test_a_check_leaves_no_trace(model_type: str, tmp_path: Path) -> None:
    root = save(tiny_config(model_type), tmp_path / "checkpoint", torch.float32)
    with node_of(root, tmp_path) as node:
        check(node)


@pytest.mark.parametrize("model_type", ["gemma4_text"])
def test_layers_that_share_what_they_attend_to(model_type: str, tmp_path: Path) -> None:
    config = tiny_config(model_type, num_kv_shared_layers=2)
    root = save(config, tmp_path / "checkpoint", torch.float32)
    with node_of(root, tmp_path) as node:
        check(node)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_next"])
def test_a_check_beside_a_second_pass_leaves_no_trace(name: str, tmp_path: Path) -> None:
    """Of run-ahead, which exact tokens have, and whose second pass outlives its token."""
    root = make(name, tmp_path / "checkpoint", torch.float32)
    with node_of(root, tmp_path, "always") as node:
        check(node)
        assert node.run_ahead is not None and node.run_ahead.status == ON


def test_where_nothing_can_be_checked_a_budget_says_so(tmp_path: Path) -> None:
    with node_of(make("mixtral", tmp_path / "checkpoint", torch.float32), tmp_path) as node:
        node.exact_pass = ExactPass(node.loaded.forward, node.cache, None)
        guard = Guard(Budget(0.01), (Rung(), Rung("lossy", LOSSY)))
        request = Request(tuple(prompt()), 20, ignore_eos=True, guard=guard)
        *_, finished = node.generate(request)
    assert isinstance(finished, Finished) and finished.routes == {"lossy": 19}
    assert finished.decode.checks == 0 < node.exact_pass.num_failed and finished.estimate is None
    [warning] = finished.warnings
    assert "not checked" in warning and "layers are not in one list" in warning


@pytest.mark.parametrize("name", ["mixtral", "qwen3_next"])
def test_a_trace_would_be_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that writes to the true state, of attention and of recurrence."""

    def leak(fork: Any, number: int) -> None:
        fork.state.layers[number] = fork._true[number]

    monkeypatch.setattr(Fork, "enter", leak)
    monkeypatch.setattr(Fork, "leave", lambda fork, number: None)
    with (
        node_of(make(name, tmp_path / "checkpoint", torch.float32), tmp_path) as node,
        pytest.raises(AssertionError),
    ):
        check(node)


def test_a_text_is_checked_as_often_as_asked(tmp_path: Path) -> None:
    with node_of(make("mixtral", tmp_path / "checkpoint", torch.float32), tmp_path) as node:
        text = ScoredText(tuple(prompt()), 12)
        plain = [*score(node, text, OneRoute(Rung("", LOSSY)))]
        checked = [*score(node, text, OneRoute(Rung("", LOSSY), 3))]
        exact = [*score(node, text, OneRoute(Rung(), 1))]
    assert [token.log_prob for token in plain] == [token.log_prob for token in checked]
    assert all(token.kl is None is token.agrees for token in plain)
    kls = [token.kl is not None for token in checked]
    assert kls == [number % 3 == 0 for number in range(1, len(kls) + 1)]
    assert {(token.kl, token.agrees) for token in exact} == {(0.0, True)}
