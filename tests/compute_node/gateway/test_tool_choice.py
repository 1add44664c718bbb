"""Calls that a client insists on: what becomes of each interface's way to say so, and real ones.

Planted faults seen red: every tool where one was named, parameters that may be anything, names
that no reader takes.
"""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from compute_node.gateway.anthropic.body import MessagesBody
from compute_node.gateway.formats.choose import Family
from compute_node.gateway.held import Held
from compute_node.gateway.openai.chat_body import ChatBody
from compute_node.gateway.refusals import Refused
from tests.compute_node.gateway.conftest import Caller

HERMES = "{{ tools }}<tool_call>"
CODER = HERMES + "<function="
ASK = [{"role": "user", "content": "In the beginning"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Köln"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def tool(name: str, parameters: Any = PARAMETERS) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def function(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


TOOLS = [tool("weather"), tool("clock", None)]


def by_openai(choice: Any, tools: list[Any] = TOOLS, template: str = HERMES) -> Held | None:
    body = ChatBody.model_validate({"messages": ASK, "tools": tools, "tool_choice": choice})
    body.check()
    return body.held(Family(template, body.offered()))


def by_anthropic(choice: Any) -> Held | None:
    tools = [{"name": "weather", "input_schema": PARAMETERS}, {"name": "clock"}]
    body = MessagesBody.model_validate(
        {"max_tokens": 9, "messages": ASK, "tools": tools, "tool_choice": choice}
    )
    body.check()
    return body.held(Family(HERMES, body.offered()))


@pytest.mark.parametrize(
    ("held", "names"),
    [
        (by_openai("required"), ["weather", "clock"]),
        (by_openai(function("clock")), ["clock"]),
        (by_anthropic({"type": "any"}), ["weather", "clock"]),
        (by_anthropic({"type": "tool", "name": "weather"}), ["weather"]),
    ],
)
def test_one_call_of_what_is_named(held: Held | None, names: list[str]) -> None:
    assert held is not None
    assert [form.opening for form in held.forms] == [
        f'<tool_call>\n{{"name": "{name}", "arguments": ' for name in names
    ]
    schemas = {"weather": PARAMETERS, "clock": {"type": "object"}}
    assert [form.json_schema for form in held.forms] == [schemas[name] for name in names]


@pytest.mark.parametrize(
    "held", [by_openai("auto"), by_openai("none"), by_openai(None), by_anthropic({"type": "auto"})]
)
def test_the_model_decides_otherwise(held: Held | None) -> None:
    assert held is None


@pytest.mark.parametrize(
    ("choice", "tools", "template", "param", "said"),
    [
        ("required", [], HERMES, "tool_choice", "no tool is offered"),
        (function("x"), TOOLS, HERMES, "tool_choice", "no tool is called 'x'"),
        ("required", TOOLS, CODER, "tool_choice", "only none and auto"),
        ("required", TOOLS, HERMES + "<arg_key>", "tool_choice", "only none and auto"),
        ("required", TOOLS, "{{ tools }}<|channel|><|message|>", "tool_choice", "in channels"),
        ("required", TOOLS, "", "tools", "does not say how tools are called"),
        ("required", [tool("a b")], HERMES, "tools", "'a b' is no name"),
        ("required", [tool("a", {"type": "string"})], HERMES, "tools", "no schema of an object"),
        ("sometimes", TOOLS, HERMES, "tool_choice", "are supported"),
        ({"type": "allowed_tools"}, TOOLS, HERMES, "tool_choice", "are supported"),
    ],
)
def test_what_cannot_be_insisted_on_is_refused_by_name(
    choice: Any, tools: list[Any], template: str, param: str, said: str
) -> None:
    with pytest.raises(Refused, match=said) as refused:
        by_openai(choice, tools, template)
    assert refused.value.param == param


OPTIONS = {"messages": ASK, "max_tokens": 400}
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"


@pytest.mark.system
@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_never_calls_does(caller: Caller, seed: int) -> None:
    options = {**OPTIONS, "temperature": 1.5, "seed": seed, "tools": TOOLS[:1]}
    options["reasoning_effort"] = "none"
    for choice in ("required", function("weather")):
        status, found = caller.ask(CHAT, {**options, "tool_choice": choice})
        assert status == 200, found
        (answer,) = found["choices"]
        assert answer["finish_reason"] == "tool_calls"
        assert answer["message"]["content"] is None
        (call,) = answer["message"]["tool_calls"]
        assert call["function"]["name"] == "weather"
        jsonschema.validate(json.loads(call["function"]["arguments"]), PARAMETERS)
        *events, _ = caller.events(CHAT, {**options, "tool_choice": choice})
        (streamed,) = (c for e in events for c in e["choices"] if "tool_calls" in c["delta"])
        (delta,) = streamed["delta"]["tool_calls"]
        assert delta["function"] == call["function"]


@pytest.mark.system
def test_a_model_that_never_calls_does_for_anthropic(caller: Caller) -> None:
    tools = [{"name": "weather", "input_schema": PARAMETERS}]
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        body = {**OPTIONS, "temperature": 0, "tools": tools, "tool_choice": choice}
        body["thinking"] = {"type": "disabled"}
        status, found = caller.ask(MESSAGES, body)
        assert status == 200, found
        assert found["stop_reason"] == "tool_use"
        (block,) = found["content"]
        assert (block["type"], block["name"]) == ("tool_use", "weather")
        jsonschema.validate(block["input"], PARAMETERS)


@pytest.mark.system
def test_parameters_that_cannot_be_kept_are_refused_by_name(caller: Caller) -> None:
    tools = [tool("weather", {"type": "object", "not": {}})]
    body = {**OPTIONS, "tools": tools, "tool_choice": "required"}
    status, found = caller.ask(CHAT, body)
    assert status == 400
    assert found["error"]["param"] == "tool_choice"
    assert "Unimplemented keys" in found["error"]["message"]
    assert caller.ask(CHAT, {**body, "tool_choice": "auto", "max_tokens": 1})[0] == 200
