"""Answers that are held to a format, over HTTP and a real stack.

Planted faults seen red: a node that holds no answers asked all the same, marks of thoughts left
out.
"""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from compute_node.client.description import Description
from compute_node.client.grammar import Form
from compute_node.gateway.formats.choose import PLAIN, Family
from compute_node.gateway.held import Held
from compute_node.gateway.openai.chat_body import ChatBody
from compute_node.gateway.refusals import Refused
from tests.compute_node.gateway.conftest import Caller

pytestmark = pytest.mark.system
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "In the beginning"}]
BODY = {
    "messages": MESSAGES,
    "temperature": 1.5,
    "max_tokens": 300,
    "chat_template_kwargs": {"enable_thinking": False},
}
SCHEMA = {
    "type": "object",
    "properties": {"word": {"enum": ["light", "dark"]}, "day": {"enum": [1, 2, 3]}},
    "required": ["word", "day"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def as_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


@pytest.mark.parametrize("seed", range(3))
def test_a_chat_keeps_to_a_schema(caller: Caller, seed: int) -> None:
    body = {**BODY, "response_format": as_format(SCHEMA), "seed": seed}
    status, whole = caller.ask(CHAT, body)
    assert status == 200, whole
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    *events, _ = caller.events(CHAT, body)
    streamed = [c["delta"].get("content", "") for e in events for c in e["choices"]]
    assert "".join(streamed) == choice["message"]["content"]


def test_any_object_is_asked_for_by_type(caller: Caller) -> None:
    for wanted in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x"}}):
        body = {**BODY, "temperature": 0, "max_tokens": 3, "response_format": wanted}
        _, found = caller.ask(CHAT, body)
        assert found["choices"][0]["message"]["content"].startswith("{")
        assert found["choices"][0]["finish_reason"] in ("length", "stop")


def test_text_is_held_to_nothing(caller: Caller) -> None:
    body = {**BODY, "temperature": 0, "max_tokens": 8}
    plain, text = (
        caller.ask(CHAT, {**body, **more})[1]["choices"]
        for more in ({}, {"response_format": {"type": "text"}})
    )
    assert plain == text


def test_open_thoughts_come_before_it(caller: Caller) -> None:
    """Red where the grammar begins with the thoughts: they would be JSON."""
    more = {"response_format": as_format(SCHEMA), "chat_template_kwargs": {"enable_thinking": True}}
    body = {**BODY, "temperature": 0, "max_tokens": 24}
    _, held = caller.ask(CHAT, {**body, **more})
    _, free = caller.ask(CHAT, {**body, "chat_template_kwargs": {"enable_thinking": True}})
    assert held["choices"] == free["choices"]
    assert held["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        (as_format({"not": {}}), "response_format", "Unimplemented keys"),
        (as_format({"type": "string", "pattern": "(?=a)"}), "response_format", "look-around"),
        (as_format({"a": "x" * 140_000}), "response_format", "at most 131,072"),
        (as_format(7), "response_format.json_schema.schema", "should be an object"),
        ({"type": "json_schema"}, "response_format.json_schema", "give a schema"),
        ({"type": "grammar"}, "response_format.type", "'json_schema'"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(
    caller: Caller, change: dict[str, Any], param: str, said: str
) -> None:
    for stream in (False, True):
        body = {**BODY, "response_format": change, "stream": stream}
        status, found = caller.ask(CHAT, body)
        assert status == 400
        error = found["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert said in error["message"]


def test_tools_and_a_format_at_once_are_refused() -> None:
    given = {"messages": MESSAGES, "tools": [TOOL], "response_format": as_format(SCHEMA)}
    with pytest.raises(Refused, match="tool_choice to none"):
        ChatBody.model_validate(given).check()
    ChatBody.model_validate({**given, "tool_choice": "none"}).check()


def described(grammar: str) -> Description:
    return Description("m", "", 64, 0, "", (), "exact", grammar)


def test_a_node_that_holds_no_answers_is_named() -> None:
    held = Held((Form(SCHEMA),), "response_format")
    assert held.grammar(PLAIN, described("on")).forms == (Form(SCHEMA),)
    with pytest.raises(Refused, match="response_format: WordPiece") as refused:
        held.grammar(PLAIN, described("off: WordPiece"))
    assert refused.value.param == "response_format"
    with pytest.raises(Refused, match="answers in channels"):
        held.grammar(Family("<|channel|><|message|>"), described("on"))


def test_a_template_of_thoughts_names_their_marks() -> None:
    held = Held((Form(SCHEMA),), "response_format")
    assert held.grammar(Family("{{ '<think>' }}"), described("on")).thoughts == (
        "<think>",
        "</think>",
    )
    assert held.grammar(Family("plain"), described("on")).thoughts is None
