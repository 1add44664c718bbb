"""Logits that are NaN or infinite end a request with an error that names where they come from;
minus infinity for tokens that must not come does not.

Planted faults seen red: NaN alone looked for, the hooks left in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compute_node.client.sampling_options import SamplingOptions
from compute_node.engine.engine import Engine
from compute_node.engine.request import Request
from compute_node.engine.scoring import ScoredText, score
from deploy.terminal import console
from expert_store.offline.index import index
from proto import errors
from tests.checkpoints import make
from tests.contract.test_exactness import engine, prompt

GREEDY, DRAWN = SamplingOptions(), SamplingOptions(temperature=1.0, seed=1)
ENDS: list[Callable[[Engine], Iterator[Any]]] = [
    lambda node: node.generate(Request(tuple(prompt()), 4, GREEDY, ignore_eos=True)),
    lambda node: node.generate(Request(tuple(prompt()), 4, DRAWN, ignore_eos=True)),
    lambda node: score(node, ScoredText(tuple(prompt()[:6]), 6)),
]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("finite")
    root = make("qwen3_moe", folder / "checkpoint", torch.bfloat16)
    index(root, folder / "store")
    with engine(folder / "store", folder) as started:
        yield started


def parameter(node: Engine, name: str) -> torch.Tensor:
    found: torch.Tensor = node.loaded.model.get_parameter(name).data
    return found


@pytest.mark.parametrize("end", ENDS, ids=["greedy", "drawn", "scored"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_dense_weight_is_named(
    value: float, end: Callable[[Engine], Iterator[Any]], node: Engine
) -> None:
    name = "model.layers.1.self_attn.o_proj"
    list(end(node))  # so that routers are recognised, and keep a hook
    num_hooks = count_hooks(node)
    weight = parameter(node, f"{name}.weight")
    before = weight[3, 5].clone()
    weight[3, 5] = value
    try:
        with pytest.raises(errors.NotFinite, match=rf"in {name} \(.*whose weight holds"):
            list(end(node))
    finally:
        weight[3, 5] = before
    assert list(end(node)), "the node goes on"
    assert count_hooks(node) == num_hooks, "those that looked for the fault are gone"


def count_hooks(node: Engine) -> int:
    return sum(len(module._forward_hooks) for module in node.loaded.model.modules())


def test_an_expert_is_named(tmp_path: Path) -> None:
    """All that are chosen beside it are sound."""
    root = make("qwen3_moe", tmp_path / "checkpoint", torch.bfloat16)
    weights = load_file(root / "model.safetensors")
    weights["model.layers.0.mlp.experts.9.down_proj.weight"][3, 5] = float("inf")
    save_file(weights, root / "model.safetensors", {"format": "pt"})
    index(root, tmp_path / "store")
    with engine(tmp_path / "store", tmp_path) as node:
        for end in ENDS[:2]:
            with pytest.raises(
                errors.NotFinite, match=r"layers\.0\.mlp\.experts .*, expert L00E009:"
            ):
                list(end(node))


def test_tokens_that_must_not_come_may_be_minus_infinity(node: Engine) -> None:
    """As a model with a masked vocabulary gives them."""

    def mask(_: nn.Module, __: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.arange(64, 128), float("-inf"))

    hook = node.loaded.model.lm_head.register_forward_hook(mask)
    try:
        for end in ENDS[:2]:
            tokens = [event.token_id for event in end(node) if hasattr(event, "token_id")]
            assert len(tokens) == 4 and max(tokens) < 64
        log_probs = [token.log_prob for token in score(node, ScoredText((5, 6, 100), 3))]
    finally:
        hook.remove()
    assert log_probs[0] > float("-inf") == log_probs[1]


def test_a_vocabulary_masked_in_full_is_refused(node: Engine) -> None:
    def mask(_: nn.Module, __: Any, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, float("-inf"))

    hook = node.loaded.model.lm_head.register_forward_hook(mask)
    try:
        with pytest.raises(errors.NotFinite):
            list(ENDS[0](node))
    finally:
        hook.remove()


def test_options_that_make_logits_infinite_are_refused(node: Engine) -> None:
    def enlarge(_: nn.Module, __: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().mul(1e36).bfloat16()

    hook = node.loaded.model.lm_head.register_forward_hook(enlarge)
    options = SamplingOptions(temperature=0.001, seed=1)
    try:
        with pytest.raises(errors.InvalidRequest, match="temperature"):
            list(node.generate(Request(tuple(prompt()), 4, options)))
    finally:
        hook.remove()


def test_the_command_ends_as_it_does_for_damage() -> None:
    assert console.exit_code(errors.NotFinite("")) == console.DAMAGED
