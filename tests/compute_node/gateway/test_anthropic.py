"""Anthropic's interface over a real stack.

Planted faults seen red: a block that is never closed, a stop sequence taken for the end of a turn,
results of tools dropped.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from compute_node.gateway.anthropic.blocks import Blocks
from compute_node.gateway.anthropic.body import MessagesBody
from compute_node.gateway.formats.said import Call, Text, Thought
from tests.compute_node.gateway.conftest import Caller
from tests.stack import ServedStack

MESSAGES = "/v1/messages"
PROMPT = [{"role": "user", "content": "In the beginning"}]
GREEDY = {"max_tokens": 16, "temperature": 0, "messages": PROMPT}


def read_events(data: bytes) -> list[Any]:
    parts = [part.split("\n") for part in data.decode().split("\n\n") if part]
    documents = [json.loads(data.removeprefix("data: ")) for _, data in parts]
    assert [kind.removeprefix("event: ") for kind, _ in parts] == [d["type"] for d in documents]
    return documents


@pytest.mark.system
def test_an_answer_whole_and_as_events(caller: Caller, stack: ServedStack) -> None:
    with stack.client() as node:
        expected = node.generate(PROMPT, max_tokens=16).run()
    status, whole = caller.ask(MESSAGES, GREEDY)
    assert status == 200
    assert whole["content"] == [{"type": "text", "text": expected.text}]
    assert whole["stop_reason"] == "max_tokens"
    usage = whole["usage"]
    assert usage["output_tokens"] == len(expected.token_ids)
    prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert prompt == len(expected.prompt_token_ids)
    events = read_events(caller.send(MESSAGES, {**GREEDY, "stream": True})[1])
    assert [e["type"] for e in events[:2]] == ["message_start", "content_block_start"]
    assert [e["type"] for e in events[-3:]] == [
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert "".join(e["delta"]["text"] for e in events[2:-3]) == expected.text
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"


@pytest.mark.system
def test_a_stop_sequence_is_named(caller: Caller) -> None:
    _, whole = caller.ask(MESSAGES, GREEDY)
    stop = whole["content"][0]["text"].strip()[2:5]
    _, found = caller.ask(MESSAGES, {**GREEDY, "stop_sequences": [stop]})
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", stop)


@pytest.mark.system
def test_thoughts_are_a_block_of_their_own(caller: Caller) -> None:
    _, found = caller.ask(MESSAGES, {**GREEDY, "thinking": {"type": "enabled"}})
    assert [block["type"] for block in found["content"]] == ["thinking"]


@pytest.mark.system
@pytest.mark.parametrize(
    ("change", "status", "kind"),
    [
        ({"model": "claude"}, 404, "not_found_error"),
        ({"max_tokens": None}, 400, "invalid_request_error"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error"),
        (
            {"messages": [*PROMPT, {"role": "assistant", "content": "x"}]},
            400,
            "invalid_request_error",
        ),
        ({"mcp_servers": [{}]}, 400, "invalid_request_error"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            400,
            "invalid_request_error",
        ),
    ],
)
def test_refusals_have_anthropics_shape(
    caller: Caller, change: dict[str, Any], status: int, kind: str
) -> None:
    found = caller.ask(MESSAGES, {**GREEDY, **change})
    assert (found[0], found[1]["type"], found[1]["error"]["type"]) == (status, "error", kind)


def test_tools_and_their_results_become_chat_messages() -> None:
    use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Paris"}}
    result = {
        "type": "tool_result",
        "tool_use_id": "t1",
        "content": [{"type": "text", "text": "5"}],
    }
    body = MessagesBody.model_validate(
        {
            **GREEDY,
            "system": [{"type": "text", "text": "Be brief."}],
            "messages": [
                *PROMPT,
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}, use]},
                {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
            ],
        }
    )
    call = {"id": "t1", "type": "function"}
    assert body.prompt() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "In the beginning"},
        {
            "role": "assistant",
            "content": "",
            "reasoning": "Hm.",
            "tool_calls": [
                {**call, "function": {"name": "weather", "arguments": {"city": "Paris"}}}
            ],
        },
        {"role": "tool", "content": "5", "tool_call_id": "t1"},
        {"role": "user", "content": "And?"},
    ]


def test_every_block_is_opened_and_closed_once() -> None:
    blocks, events = Blocks(), list[str]()
    for said in (Thought("Hm"), Thought("."), Text("a"), Call("f", '{"x": 1}'), Text("b")):
        events += blocks.add(said)
    events += blocks.close()
    kinds = [json.loads(event.split("data: ")[1])["type"] for event in events]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4
    assert [block["type"] for block in blocks.content] == ["thinking", "text", "tool_use", "text"]
    assert blocks.content[2]["input"] == {"x": 1}
