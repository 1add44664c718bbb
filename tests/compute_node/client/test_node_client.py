"""What a Python caller passes is carried as it was meant, or refused by name before it is sent.

Planted faults seen red: chat messages dropped beside token ids, other keys and None taken for text,
one stop string taken for three, bytes for token ids, NaN for a temperature or a deadline.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from compute_node.client.node_client import NodeClient
from proto import compute_node_pb2 as pb
from proto import errors, stats

CHAT = {"role": "user", "content": "hello"}


class Recorder:
    """A node's stub that keeps what it is asked."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def ask(self, request: Any, timeout: float | None) -> Any:
        self.requests.append(request)
        return stats.snapshot()

    Generate = Score = Forward = Stats = ask


@pytest.fixture
def client() -> Any:
    with NodeClient("unix:/nobody/listens/here") as connected:
        connected._stub = Recorder()  # type: ignore[assignment]
        yield connected


def sent(client: Any) -> Any:
    (request,) = client._stub.requests
    return request


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([CHAT, 5], "mixes chat messages with other things"),
        ([5, CHAT], "mixes chat messages with other things"),
        ([{**CHAT, "audio": "x", "id": 5}], "'audio', 'id': only content, name, reasoning, role"),
        ([{**CHAT, "tool_calls": "x"}], "0's tool_calls is of type str"),
        ([{**CHAT, "tool_calls": [{1j: 2}]}], "0's tool_calls is no JSON"),
        ([{"role": "user"}], "chat message 0 has no 'content'"),
        ([{"role": "user", "content": None}], "0's content is of type NoneType"),
        ([CHAT, {"role": "user", "content": [{"type": "text"}]}], "1's content is of type list"),
        (CHAT, "prompt is of type dict"),
        (b"abc", "prompt is of type bytes"),
        (None, "prompt is of type NoneType"),
        (5, "prompt is of type int"),
        ([], "empty"),
        (["a", "b"], r"prompt\[0\] is of type str"),
        ([1.0], r"prompt\[0\] is of type float"),
        ([True], r"prompt\[0\] is of type bool"),
        ([-1], r"prompt\[0\] is -1"),
        ([2**32], r"prompt\[0\] is 4294967296"),
        ("a\ud800", "half a surrogate pair at character 1"),
        ("x" * (33 << 20), "bytes, at most"),
    ],
)
def test_prompts_that_cannot_be_carried(client: Any, prompt: Any, message: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=message):
        client.generate(prompt)
    assert client._stub.requests == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0: give 1 to 4294967295"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": 2**32}, "max_tokens is 4294967296"),
        ({"max_tokens": 1.5}, "max_tokens is of type float"),
        ({"max_tokens": True}, "max_tokens is of type bool"),
        ({"logit_bias": [5]}, "logit_bias is of type list"),
        ({"logit_bias": {"5": 1}}, "a token id of logit_bias is of type str"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias of token 5 is nan"),
        ({"logit_bias": {5: 101}}, "logit_bias of token 5 is 101"),
        ({"logit_bias": {-1: 1}}, "logit_bias: -1 is no token id"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias names 1025 tokens"),
        ({"frequency_penalty": 2.5}, "frequency_penalty 2.5"),
        ({"presence_penalty": float("nan")}, "presence_penalty nan"),
        ({"min_p": 1.5}, "min_p 1.5"),
        ({"log_probs": -1}, "log_probs is -1"),
        ({"client": None}, "client is of type NoneType"),
        ({"tools": [{"type": "function"}]}, "give chat messages"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"temperature": -0.5}, "temperature -0.5"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_k": 2**32}, "top_k 4294967296"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"top_p": float("nan")}, "top_p nan"),
        ({"repetition_penalty": -1}, "repetition_penalty -1"),
        ({"seed": -1}, "seed -1 is not within"),
        ({"seed": 2**64}, "seed 18446744073709551616"),
        ({"seed": 1.0}, "seed is of type float"),
        ({"stop": b"abc"}, "stop is of type bytes"),
        ({"stop": ["a", 5]}, r"stop\[1\] is of type int"),
        ({"stop": ""}, "a stop string is empty"),
        ({"stop": None}, "stop is of type NoneType"),
        ({"stop_token_ids": 5}, "stop_token_ids is of type int"),
        ({"stop_token_ids": "5"}, "stop_token_ids is of type str"),
        ({"stop_token_ids": [-1]}, r"stop_token_ids\[0\] is -1"),
        ({"ignore_eos": "no"}, "ignore_eos is 'no'"),
        ({"skip_special_tokens": None}, "skip_special_tokens is None"),
        ({"record": 1}, "record is 1"),
        ({"router_scores": True}, "set record, too"),
        ({"max_prompt_tokens": -1}, "max_prompt_tokens is -1"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"timeout_s": float("inf")}, "timeout_s is inf"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"timeout_s": -1}, "timeout_s is -1"),
        ({"timeout_s": "5"}, "timeout_s is '5'"),
    ],
)
def test_options_that_cannot_be_carried(client: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=message):
        client.generate("In", **options)
    assert client._stub.requests == []


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (b"ab", {}, "text is of type bytes"),
        ([CHAT], {}, r"text\[0\] is of type dict"),
        (None, {}, "text is of type NoneType"),
        ("a", {"max_tokens": -1}, "max_tokens is -1"),
        ("a", {"context_tokens": 2**32}, "context_tokens is 4294967296"),
        ("a", {"timeout_s": float("nan")}, "timeout_s is nan"),
    ],
)
def test_texts_that_cannot_be_scored(
    client: Any, text: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(errors.InvalidRequest, match=message):
        client.score(text, **options)
    assert client._stub.requests == []


def test_deadlines_of_the_other_calls(client: Any) -> None:
    for call in (
        lambda: client.stats(float("nan")),
        lambda: client.forward(pb.ForwardRequest(), 0),
    ):
        with pytest.raises(errors.InvalidRequest, match="timeout_s"):
            call()


def test_one_stop_string_is_one(client: Any) -> None:
    client.generate("In", stop="abc", max_tokens=3, skip_special_tokens=False)
    request = sent(client)
    assert (list(request.stop), request.max_tokens, request.show_special_tokens) == (
        ["abc"],
        3,
        True,
    )


def test_chats_and_numbers_of_other_libraries_are_carried(client: Any) -> None:
    client.generate(
        [CHAT, {"content": "", "role": "assistant"}], seed=np.int64(7), top_p=np.float32(1)
    )
    request = sent(client)
    assert [(m.role, m.content) for m in request.chat.messages] == [
        ("user", "hello"),
        ("assistant", ""),
    ]
    assert (request.sampling.seed, request.sampling.top_p) == (7, 1.0)
    client._stub.requests.clear()
    client.generate(np.array([5, 6]), seed=2**64 - 1)
    assert list(sent(client).token_ids.ids) == [5, 6]


def test_what_a_chats_template_reads_is_carried_as_json(client: Any) -> None:
    """Red when tools are dropped, and when non-ASCII letters are escaped: a template shows them."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": "ö"}}}
    client.generate(
        [CHAT, {"role": "assistant", "content": "", "tool_calls": [call], "reasoning": "why"}],
        tools=[{"type": "function", "function": {"name": "f"}}],
        template_options={"enable_thinking": False},
    )
    chat = sent(client).chat
    assert json.loads(chat.messages[1].tool_calls) == [call]
    assert "ö" in chat.messages[1].tool_calls
    assert chat.messages[1].reasoning == "why"
    assert json.loads(chat.tools)[0]["function"]["name"] == "f"
    assert json.loads(chat.template_options) == {"enable_thinking": False}


def test_what_the_context_leaves_is_asked_for(client: Any) -> None:
    client.generate("In", max_tokens=None, log_probs=0, logit_bias={5: -100})
    request = sent(client)
    assert (request.HasField("max_tokens"), request.fits_context) == (False, True)
    assert request.HasField("log_probs")
    assert dict(request.sampling.logit_bias) == {5: -100.0}
