"""What a node tells of its decode steps is what transformers' own routers chose for those tokens.

Planted faults seen red: layers told in reverse order, their scores in reverse order, scores after
softmax, steps told unasked, a prompt that is not cut, weights left flat.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from compute_node.client.node_client import NodeClient
from compute_node.client.result import Result
from proto import access_pb2, errors, rpc
from proto import compute_node_pb2 as pb
from proto.access import RecordedStep
from proto.compute_node_pb2_grpc import ComputeNodeStub
from tests.contract.test_exactness import align
from tests.daemons import daemon, node_table, store_table
from tests.stack import MODEL

PROMPTS = ("In the beginning God created", "def __init__(self, name):\n")
OPTIONS = {"max_tokens": 17, "temperature": 0.9, "seed": 3, "ignore_eos": True}
L, K, E = 8, 4, 32


@pytest.fixture(scope="module")
def address(tiny_store: Path) -> Iterator[str]:
    """Of a node with slots for three experts in eight."""
    with tempfile.TemporaryDirectory(prefix="fm-") as folder:
        run = Path(folder)
        with (
            daemon("expert_store", run, store_table(tiny_store, run, 100)),
            daemon("compute_node", run, node_table(run, "n", 96), "n") as started,
        ):
            yield started.address


@pytest.fixture
def client(address: str) -> Iterator[NodeClient]:
    with NodeClient(address) as connected:
        yield connected


@dataclass(frozen=True)
class Routing:
    """[L, ...] of one token, by transformers."""

    logits: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor


@pytest.fixture(scope="module")
def routers() -> Iterator[tuple[torch.nn.Module, list[tuple[torch.Tensor, ...]]]]:
    """Eager transformers, and what its routers said in the latest pass."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    model.set_experts_implementation("eager")
    align(model)
    said: list[tuple[torch.Tensor, ...]] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: said.append(output))
    yield model, said


def forced(
    routers: tuple[torch.nn.Module, list[tuple[torch.Tensor, ...]]], result: Result
) -> list[Routing]:
    """transformers' routing of every decode step, fed the tokens that the node drew."""
    model, said = routers
    chunks = [result.prompt_token_ids, *([token] for token in result.token_ids[:-1])]
    cache, steps = None, []
    for chunk in chunks:
        said.clear()
        with torch.inference_mode():
            output = model(torch.tensor([chunk]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(Routing(*(torch.stack([layer[n][0] for layer in said]) for n in range(3))))
    return steps[1:]


@pytest.mark.system
@pytest.mark.parametrize("prompt", PROMPTS)
def test_steps_are_what_transformers_routers_chose(
    client: NodeClient,
    routers: tuple[torch.nn.Module, list[tuple[torch.Tensor, ...]]],
    prompt: str,
) -> None:
    result = client.generate(prompt, record=True, router_scores=True, **OPTIONS).run()  # type: ignore[arg-type]
    expected = forced(routers, result)
    assert len(result.steps) == len(expected) == OPTIONS["max_tokens"] - 1  # type: ignore[operator]
    for step, theirs in zip(result.steps, expected, strict=True):
        assert step.topk_ids.tolist() == theirs.ids.tolist()
        assert np.array_equal(step.topk_weights, theirs.weights.float().numpy().astype(np.float16))
        assert step.router_scores is not None and step.router_scores.shape == (L, E)
        assert np.array_equal(step.router_scores, theirs.logits.float().numpy().astype(np.float16))
    rows = np.stack([step.topk_ids for step in result.steps])
    assert len(np.unique(rows)) > E // 2, "degenerate routing proves nothing"


@pytest.mark.system
def test_recording_changes_no_token_and_scores_come_only_when_asked_for(
    client: NodeClient,
) -> None:
    plain = client.generate(PROMPTS[0], **OPTIONS).run()  # type: ignore[arg-type]
    chosen = client.generate(PROMPTS[0], record=True, **OPTIONS).run()  # type: ignore[arg-type]
    scored = client.generate(PROMPTS[0], record=True, router_scores=True, **OPTIONS).run()  # type: ignore[arg-type]
    assert plain.token_ids == chosen.token_ids == scored.token_ids
    assert plain.text == chosen.text == scored.text
    assert plain.steps == []
    assert all(step.router_scores is None for step in chosen.steps)
    assert {step.topk_ids.shape for step in chosen.steps} == {(L, K)}
    assert [s.topk_ids.tolist() for s in chosen.steps] == [
        s.topk_ids.tolist() for s in scored.steps
    ]


@pytest.mark.system
def test_predictions_are_told_of_each_layer_and_change_no_token(
    client: NodeClient, routers: tuple[torch.nn.Module, list[tuple[torch.Tensor, ...]]]
) -> None:
    """Red when a row is of another layer, when residents' output is left out (what is read is then
    the stream alone), and when a prediction is of the wrong distance.
    """
    plain = client.generate(PROMPTS[0], **OPTIONS).run()  # type: ignore[arg-type]
    told = client.generate(PROMPTS[0], record=True, inputs=True, **OPTIONS).run()  # type: ignore[arg-type]
    assert plain.token_ids == told.token_ids
    truth, said, read = [], [], []
    for step, theirs in zip(told.steps, forced(routers, told), strict=True):
        assert step.foretold is not None and step.foretold.inputs is not None
        assert [each.shape for each in step.foretold.scores.values()] == [(L, 3, E)]
        assert step.foretold.inputs.shape == (L + 1, 256)
        np.testing.assert_allclose(step.foretold.truth, theirs.logits.float(), atol=0.05)
        truth.append(step.foretold.truth)
        said.append(step.foretold.scores["next_router"])
        read.append(step.foretold.inputs)
    shares = [
        named(np.stack(said)[:, ahead:, ahead - 1], np.stack(truth)[:, ahead:])
        for ahead in (1, 2, 3)
    ]
    assert shares[0] > 0.75 and shares[0] > shares[1] > shares[2] > 0.4
    assert np.isnan(np.stack(said)[:, 0]).all(), "nothing comes before the first"
    squares = np.square(np.stack(read).astype(np.float32)).mean(axis=-1)
    known = squares[np.isfinite(squares)]
    assert len(known) > 0.9 * squares.size
    np.testing.assert_allclose(known, 1, atol=0.01)


def named(scores: np.ndarray, truth: np.ndarray) -> float:
    """The share of the chosen experts that are among the best by these scores."""
    best, chosen = (np.argsort(-each, axis=-1)[..., :K] for each in (scores, truth))
    return float((best[..., :, None] == chosen[..., None, :]).any(axis=-2).mean())


@pytest.mark.system
def test_nothing_crosses_the_wire_when_not_asked_for(address: str) -> None:
    request = pb.GenerateRequest(prompt=PROMPTS[0], max_tokens=4, ignore_eos=True)
    with rpc.connect(address) as channel:
        replies = list(ComputeNodeStub(channel).Generate(request, timeout=60))
    kinds = [reply.WhichOneof("kind") for reply in replies]
    assert kinds == ["started", *["token"] * 4, "finished"]


@pytest.mark.system
def test_a_long_prompt_is_cut_when_asked_for(client: NodeClient) -> None:
    whole = client.generate(PROMPTS[0], max_tokens=1).run().prompt_token_ids
    cut = client.generate(PROMPTS[0], max_tokens=1, max_prompt_tokens=3).run()
    assert len(whole) > 3 and cut.prompt_token_ids == whole[:3]
    longer = client.generate(PROMPTS[0], max_tokens=1, max_prompt_tokens=500).run()
    assert longer.prompt_token_ids == whole


def step_message(**changes: object) -> access_pb2.StepAccess:
    fields = {
        "num_layers": 2,
        "top_k": 1,
        "num_experts": 3,
        "topk_ids": np.array([2, 0], "<u2").tobytes(),
        "topk_weights": np.array([1.0, 0.5], "<f2").tobytes(),
        "router_scores": np.arange(6).astype("<f2").tobytes(),
    }
    return access_pb2.StepAccess(**{**fields, **changes})  # type: ignore[arg-type]


def foretold(**changes: object) -> access_pb2.Foretold:
    said = access_pb2.Foretelling(predictor="map", scores=bytes(2 * 2 * 3))
    fields = {"num_layers": 2, "num_experts": 3, "num_ahead": 1, "truth": bytes(2 * 2 * 3)}
    return access_pb2.Foretold(**{**fields, "predictors": [said], **changes})  # type: ignore[arg-type]


def test_what_was_foretold_decodes_row_after_row() -> None:
    step = RecordedStep.from_pb(step_message(foretold=foretold(inputs=bytes(12), hidden_size=2)))
    assert step.foretold is not None and step.foretold.inputs is not None
    assert step.foretold.inputs.shape == (3, 2) and step.foretold.truth.shape == (2, 3)
    assert {name: each.shape for name, each in step.foretold.scores.items()} == {"map": (2, 1, 3)}
    again = RecordedStep.from_pb(step.to_pb()).foretold
    assert again is not None and again.inputs is not None
    assert (again.inputs.nbytes, again.truth.nbytes, again.scores["map"].nbytes) == (12, 12, 12)


def test_a_step_decodes_row_after_row() -> None:
    step = RecordedStep.from_pb(step_message())
    assert step.topk_ids.tolist() == [[2], [0]]
    assert step.topk_weights.tolist() == [[1.0], [0.5]]
    assert step.router_scores is not None
    assert step.router_scores.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 2},
        {"topk_ids": b"abc"},
        {"topk_weights": b""},
        {"num_experts": 4},
        {"router_scores": b""},
        {"foretold": foretold(num_layers=3)},
        {"foretold": foretold(truth=b"1")},
        {"foretold": foretold(num_ahead=100)},
        {"foretold": foretold(num_ahead=2)},
        {"foretold": foretold(inputs=b"12", hidden_size=2)},
    ],
    ids=str,
)
def test_a_step_of_the_wrong_size_is_typed(changes: dict[str, object]) -> None:
    with pytest.raises(errors.MessageInvalid):
        RecordedStep.from_pb(step_message(**changes))


def test_a_lossy_route_is_told_as_the_routers_chose(client: NodeClient) -> None:
    """Red with the marks of what was left out in it: no reader takes two alike."""
    other = list(range(900, 940))  # not all of its experts are in memory
    result = client.generate(other, route="skip 1", record=True, **OPTIONS).run()  # type: ignore[arg-type]
    assert result.decode.skipped > 0 == result.decode.substituted and len(result.steps) == 16
    for step in result.steps:
        ids = step.topk_ids.reshape(L, K)
        assert ids.max() < E and all(len(set(row)) == K for row in ids.tolist())
        assert not step.topk_weights.reshape(L, K).min() <= 0
    read = result.decode.hits + result.decode.misses
    assert read == 16 * L * K - result.decode.skipped
