"""Every RPC of a real node, good and bad input: typed errors, and the daemon stays healthy.

Planted faults seen red: no length check in Forward, seeds that are ignored.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from compute_node.client.node_client import NodeClient
from proto import compute_node_pb2 as pb
from proto import errors, rpc
from proto.compute_node_pb2_grpc import ComputeNodeStub
from tests.contract.test_exactness import align
from tests.daemons import DaemonProcess, daemon, node_table, store_table
from tests.stack import MODEL

pytestmark = pytest.mark.system
TYPED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
ANY_OUTPUT = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def node(tiny_store: Path) -> Iterator[DaemonProcess]:
    with tempfile.TemporaryDirectory(prefix="fm-") as folder:
        run = Path(folder)
        with (
            daemon("expert_store", run, store_table(tiny_store, run, 100)),
            daemon("compute_node", run, node_table(run, "n", 96), "n") as started,
        ):
            yield started
            with NodeClient(started.address) as client:
                result = client.generate("In", max_tokens=2, ignore_eos=True).run()
                assert len(result.token_ids) == 2, "the node did not survive the tests"


@pytest.fixture
def client(node: DaemonProcess) -> Iterator[NodeClient]:
    with NodeClient(node.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def eager() -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    model.set_experts_implementation("eager")
    align(model)
    return model  # type: ignore[no-any-return]


def test_streamed_text_is_the_decoded_tokens(client: NodeClient) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    generation = client.generate("Grüße und ", max_tokens=60, temperature=1.2, seed=5)
    streamed = "".join(piece.text for piece in generation)
    assert generation.result is not None
    result = generation.result
    whole = tokenizer.decode(result.prompt_token_ids + result.token_ids, skip_special_tokens=True)
    prompt = tokenizer.decode(result.prompt_token_ids, skip_special_tokens=True)
    assert streamed == result.text
    assert whole.removeprefix(prompt).rstrip("\ufffd").startswith(streamed.rstrip("\ufffd"))


def test_a_route_is_its_requests_alone(client: NodeClient) -> None:
    """An exact request beside lossy ones gives what it gave before: red where a policy stays. The
    lossy one is about something else, so that not all of its experts are in memory.
    """
    say: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
    exact = client.generate("In the beginning", **say).run()
    lossy = client.generate(list(range(900, 940)), route="prior .9 + skip 1", **say).run()
    again = client.generate("In the beginning", **say).run()
    assert exact.token_ids == again.token_ids
    assert lossy.decode.substituted > 0 == exact.decode.substituted == again.decode.substituted
    assert exact.decode.skipped == again.decode.skipped == 0


def test_a_text_is_scored_by_a_route(client: NodeClient) -> None:
    token_ids = list(range(3, 60))
    exact, lossy = (
        [token.log_prob for token in client.score(token_ids, route=route)]
        for route in ("exact", "prior .9")
    )
    assert exact != lossy
    assert sum(exact) / sum(lossy) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("route", ["prior", "nothing .5", "skip 2"])
def test_a_route_that_is_no_rule_is_refused(client: NodeClient, route: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="is no rule"):
        client.generate("In", route=route).run()
    with pytest.raises(errors.InvalidRequest, match="is no rule"):
        list(client.score("In the beginning", route=route))


def test_seed_decides_and_differs(client: NodeClient) -> None:
    def tokens(seed: int) -> list[int]:
        return client.generate("In the", max_tokens=24, temperature=1.0, seed=seed).run().token_ids

    assert tokens(1) == tokens(1) != tokens(2)


def test_stop_string_is_cut_and_nothing_after_it_goes_out(client: NodeClient) -> None:
    free = client.generate("In the beginning God created", max_tokens=40).run().text
    stop = free[10:14]
    result = client.generate("In the beginning God created", max_tokens=40, stop=[stop]).run()
    assert result.finish_reason == "stop"
    assert result.text == free[: free.index(stop)]


def test_stop_token_and_length(client: NodeClient) -> None:
    free = client.generate("In the beginning", max_tokens=10, ignore_eos=True).run()
    assert free.finish_reason == "length"
    stopped = client.generate("In the beginning", stop_token_ids=[free.token_ids[4]]).run()
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[4]) + 1]


def test_usage_adds_up(client: NodeClient) -> None:
    result = client.generate([5, 6, 7], max_tokens=9, ignore_eos=True).run()
    assert result.prompt_token_ids == [5, 6, 7]
    assert (result.prefill.tokens, result.decode.tokens) == (3, 8)
    assert result.decode.hits + result.decode.misses == 8 * 8 * 4
    assert result.ttft_s >= result.prefill.stall_s > 0 or result.prefill.misses == 0


def test_chat_without_a_template_is_refused(client: NodeClient) -> None:
    with pytest.raises(errors.InvalidRequest, match="no chat template"):
        client.generate([{"role": "user", "content": "hello"}]).run()


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "give a prompt|empty"),
        ("", {}, "empty"),
        ([9000], {}, "beyond the vocabulary"),
        ("In", {"max_tokens": 5000}, "max_context_tokens"),
        ("In", {"temperature": -1.0}, "temperature"),
        ("In", {"temperature": float("nan")}, "temperature"),
        ("In", {"top_p": 1.5}, "top_p"),
        ("In", {"stop": ["x"] * 20}, "stop strings"),
        ("In", {"stop": ["a<|endoftext|>"]}, "left out of the text"),
    ],
)
def test_bad_requests_are_named(
    client: NodeClient, prompt: object, options: dict[str, object], message: str
) -> None:
    with pytest.raises(errors.InvalidRequest, match=message):
        client.generate(prompt, **options).run()  # type: ignore[arg-type]


def test_no_new_tokens_are_refused_and_a_missing_number_is_the_default(
    node: DaemonProcess,
) -> None:
    with rpc.connect(node.address) as channel:
        stub = ComputeNodeStub(channel)
        with pytest.raises(grpc.RpcError, match="max_tokens must be at least 1"):
            list(stub.Generate(pb.GenerateRequest(prompt="In", max_tokens=0), timeout=20))
        long = pb.TokenIds(ids=[5] * 2000)
        with pytest.raises(grpc.RpcError, match="prompt of 2000 and max_tokens of 128"):
            list(stub.Generate(pb.GenerateRequest(token_ids=long), timeout=20))


def test_special_tokens_are_told_on_request(client: NodeClient) -> None:
    """A text that shows them may be stopped by what holds one (test_writer.py has the rest)."""
    stop = ["a<|endoftext|>"]
    assert client.generate("In", max_tokens=2, stop=stop, skip_special_tokens=False).run().text


@pytest.mark.parametrize("is_decode", [False, True])
def test_forward_is_one_moe_layer(
    client: NodeClient, eager: torch.nn.Module, is_decode: bool
) -> None:
    """Bit-identical to the eager experts module of that layer: on a prompt's tokens at once, in
    decode on each row alone (tests/contract/test_batch.py has shapes where that differs).
    """
    experts = eager.model.layers[3].mlp.experts  # type: ignore[union-attr, index]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 256, generator=generator).to(torch.bfloat16)
    ids = torch.randperm(32, generator=generator)[:4].repeat(5, 1)
    weights = torch.rand(5, 4, generator=generator)
    request = pb.ForwardRequest(
        layer=3,
        num_tokens=5,
        hidden_states=hidden.view(torch.uint8).numpy().tobytes(),
        topk_ids=ids.int().numpy().tobytes(),
        topk_weights=weights.numpy().tobytes(),
        is_decode=is_decode,
    )
    parts = [slice(row, row + 1) for row in range(5)] if is_decode else [slice(None)]
    with torch.inference_mode():
        outputs = [experts(hidden[part], ids[part], weights[part]) for part in parts]  # type: ignore[operator]
    expected = torch.cat(outputs)
    answer = bytearray(client.forward(request))
    assert torch.equal(torch.frombuffer(answer, dtype=torch.bfloat16).view(5, 256), expected)


def test_without_redis_evidence_and_advice_show_nothing(client: NodeClient) -> None:
    """Zeros, as ever. Red where a node without them has no such counters."""
    shown = client.stats()
    assert (shown.evidence_sent, shown.evidence_dropped, shown.advice_version) == (0, 0, 0)
    assert shown.advice_age_s is None


def test_scores_are_those_of_decode(client: NodeClient, eager: torch.nn.Module) -> None:
    """The last bit, one token at a time: a prompt computed at once rounds otherwise."""
    token_ids, cache = [11, 500, 23, 8000, 23, 500, 77, *range(100, 1700, 40)], None
    expected = []
    with torch.inference_mode():
        for token_id, following in itertools.pairwise(token_ids):
            step = eager(torch.tensor([[token_id]]), past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            expected.append(float(step.logits[0, -1].double().log_softmax(-1)[following]))
        at_once = eager(torch.tensor([token_ids])).logits[0].double().log_softmax(-1)
    picked = at_once[range(len(expected)), token_ids[1:]].tolist()
    assert picked != expected, "otherwise this proves nothing"
    scored = list(client.score(token_ids))
    assert [token.token_id for token in scored] == token_ids[1:]
    assert [token.log_prob for token in scored] == expected


def test_long_texts_are_scored_in_pieces(client: NodeClient) -> None:
    """Each from its own start; the last token, alone in its piece, is not scored."""
    text = "In the beginning God created the heaven and the earth."
    token_ids = client.generate(text, max_tokens=1).run().prompt_token_ids
    whole = list(client.score(text))
    assert whole == list(client.score(token_ids))
    size = (len(token_ids) - 1) // 2
    pieces = [token_ids[:size], token_ids[size : 2 * size]]
    expected = [token for piece in pieces for token in client.score(piece)]
    assert list(client.score(token_ids[: 2 * size + 1], context_tokens=size)) == expected
    assert list(client.score(text, max_tokens=size)) == whole[: size - 1]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "at least two tokens"),
        ([5], {}, "at least two tokens"),
        ([5, 6, 7], {"max_tokens": 1}, "at least two tokens"),
        ([5, 6, 7], {"context_tokens": 1}, "at least two tokens"),
        ([5, 9000], {}, "beyond the vocabulary"),
        ([5] * 3000, {"context_tokens": 2500}, "max_context_tokens"),
        ("x" * (1 << 20) + "x", {}, "send it in parts"),
    ],
)
def test_texts_that_cannot_be_scored_are_named(
    client: NodeClient, text: str | list[int], options: dict[str, int], message: str
) -> None:
    with pytest.raises(errors.InvalidRequest, match=message):
        list(client.score(text, **options))  # type: ignore[arg-type]


@ANY_OUTPUT
@given(
    layer=st.integers(0, 2**32 - 1),
    num_tokens=st.one_of(st.integers(0, 4), st.integers(0, 2**32 - 1)),
    hidden=st.binary(max_size=2100),
    ids=st.one_of(
        st.binary(max_size=64),
        st.lists(st.integers(-1, 40), max_size=16).map(
            lambda values: np.array(values, np.int32).tobytes()
        ),
    ),
    weights=st.binary(max_size=64),
    is_decode=st.booleans(),
)
def test_any_forward_request_is_answered_or_typed(
    node: DaemonProcess,
    layer: int,
    num_tokens: int,
    hidden: bytes,
    ids: bytes,
    weights: bytes,
    is_decode: bool,
) -> None:
    request = pb.ForwardRequest(
        layer=layer,
        num_tokens=num_tokens,
        hidden_states=hidden,
        topk_ids=ids,
        topk_weights=weights,
        is_decode=is_decode,
    )
    with rpc.connect(node.address) as channel:
        try:
            ComputeNodeStub(channel).Forward(request, timeout=20)
        except grpc.RpcError as error:
            assert error.code() in TYPED, error  # type: ignore[attr-defined]


@ANY_OUTPUT
@given(
    token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=8),
    max_tokens=st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1)),
    temperature=st.floats(),
    top_k=st.integers(0, 2**32 - 1),
    top_p=st.floats(),
    penalty=st.floats(),
    stop=st.lists(st.text(max_size=5), max_size=3),
)
def test_any_generate_request_is_answered_or_typed(
    node: DaemonProcess,
    token_ids: list[int],
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    penalty: float,
    stop: list[str],
) -> None:
    sampling = pb.Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty, seed=1
    )
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=token_ids),
        max_tokens=max_tokens,
        sampling=sampling,
        stop=stop,
    )
    with rpc.connect(node.address) as channel:
        try:
            list(ComputeNodeStub(channel).Generate(request, timeout=20))
        except grpc.RpcError as error:
            assert error.code() in TYPED, error  # type: ignore[attr-defined]
