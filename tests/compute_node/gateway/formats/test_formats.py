"""Answers taken apart, however they are cut: every format, fed whole, in pieces and by characters.

Planted faults seen red: a marker cut in two shown as text, a malformed call lost, thoughts that a
prompt has opened shown as text.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from compute_node.gateway.formats.choose import Family
from compute_node.gateway.formats.said import Call, Said, Text, Thought
from compute_node.gateway.refusals import Refused

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
]
PARIS = Call("weather", '{"city": "Paris", "days": 2}')
CITY = Call("weather", '{"city": "5"}')
HERMES = "{{ tools }}<tool_call>"
THINKING = HERMES + "<think>"
CODER = HERMES + "<function="
GLM = HERMES + "<arg_key>"
MISTRAL = "{{ tools }}[TOOL_CALLS]"
LLAMA = "{{ tools }}<|start_header_id|>parameters"
DEEPSEEK = "{{ tools }}<｜tool▁calls▁begin｜>"  # noqa: RUF001
HARMONY = "{{ tools }}<|channel|><|message|>"
ARGUMENTS = '{"city": "Paris", "days": 2}'
OBJECT = '{"name": "weather", "arguments": {"city": "Paris", "days": 2}}'
CASES: dict[str, tuple[str, str, str, list[Said]]] = {
    "plain": ("", "", "Hello <tool_call>", [Text("Hello <tool_call>")]),
    "hermes": (
        HERMES,
        "",
        f"Let me see.\n<tool_call>\n{OBJECT}\n</tool_call>\n<tool_call>{OBJECT}</tool_call>",
        [Text("Let me see."), PARIS, PARIS],
    ),
    "hermes, not closed": (HERMES, "", f"<tool_call>{OBJECT}", [PARIS]),
    "hermes, malformed": (
        HERMES,
        "",
        'a <tool_call>{"name": }</tool_call> b',
        [Text('a <tool_call>{"name": }</tool_call> b')],
    ),
    "thoughts": (
        THINKING,
        "",
        f"<think>\nWhy?\n</think>\n\nSo: <tool_call>{OBJECT}</tool_call>",
        [Thought("Why?\n"), Text("So:"), PARIS],
    ),
    "thoughts opened by the prompt": (
        THINKING,
        "assistant\n<think>\n",
        "Why?</think>42",
        [Thought("Why?"), Text("42")],
    ),
    "thoughts closed by the prompt": (
        THINKING,
        "<think>\n\n</think>\n\n",
        "42 <think>",
        [Text("42 <think>")],
    ),
    "thoughts cut off": (THINKING, "<think>", "Why </thi", [Thought("Why </thi")]),
    "coder": (
        CODER,
        "",
        "<tool_call>\n<function=weather>\n<parameter=city>\n5\n</parameter>\n</function>\n"
        "</tool_call>",
        [CITY],
    ),
    "glm": (
        GLM,
        "",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
        [PARIS],
    ),
    "mistral": (MISTRAL, "", f"[TOOL_CALLS][{OBJECT}]", [PARIS]),
    "mistral, named": (
        MISTRAL,
        "",
        f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]weather[ARGS]{ARGUMENTS}",
        [PARIS, PARIS],
    ),
    "llama": (LLAMA, "", OBJECT.replace("arguments", "parameters"), [PARIS]),
    "llama, text": (LLAMA, "", "{braces} are text", [Text("{braces} are text")]),
    "deepseek": (
        DEEPSEEK,
        "",
        "Hm.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"  # noqa: RUF001
        f"```json\n{ARGUMENTS}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",  # noqa: RUF001
        [Text("Hm."), PARIS],
    ),
    "deepseek 3.1": (
        DEEPSEEK,
        "",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{ARGUMENTS}"  # noqa: RUF001
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",  # noqa: RUF001
        [PARIS],
    ),
    "harmony": (
        HARMONY,
        "<|start|>assistant",
        "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.weather <|constrain|>json<|message|>{ARGUMENTS}<|call|>",
        [Thought("Think."), PARIS],
    ),
    "harmony, recipient first": (
        HARMONY,
        "",
        f" to=functions.weather<|channel|>commentary<|message|>{ARGUMENTS}",
        [PARIS],
    ),
    "harmony, final": (
        HARMONY,
        "",
        "<|channel|>final<|message|>It is <b>warm</b>.<|return|>",
        [Text("It is <b>warm</b>.")],
    ),
}


def read(template: str, prompt_end: str, pieces: list[str]) -> list[Said]:
    """Neighbours of one kind joined."""
    found = Family(template, TOOLS if template else ()).new_format(prompt_end)
    said = [one for piece in pieces for one in found.feed(piece)] + list(found.end())
    joined: list[Said] = []
    for kind, group in itertools.groupby(said, key=type):
        if kind is Call:
            joined += group
        else:
            joined.append(kind("".join(one.text for one in group)))  # type: ignore[union-attr]
    return joined


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_taken_apart_however_it_is_cut(case: str, size: int) -> None:
    template, prompt_end, answer, expected = CASES[case]
    pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
    assert read(template, prompt_end, pieces) == expected


def test_arguments_are_json_of_the_types_that_the_tool_wants() -> None:
    (call,) = read(CODER, "", [CASES["coder"][2]])
    assert isinstance(call, Call)
    assert json.loads(call.arguments) == {"city": "5"}


@pytest.mark.parametrize("template", ["", "{{ tools }}", "<tool_call>"])
def test_tools_are_refused_where_no_template_says_how_they_are_called(template: str) -> None:
    with pytest.raises(Refused, match="tools: this model's chat template"):
        Family(template, TOOLS).check()


@pytest.mark.parametrize("template", [HERMES, CODER, GLM, MISTRAL, LLAMA, DEEPSEEK, HARMONY])
def test_tools_are_taken_where_it_does(template: str) -> None:
    Family(template, TOOLS).check()
    found: Any = Family(template, TOOLS)
    assert found.shows_special_tokens


FENCED = DEEPSEEK + "```json"
WRITTEN = [HERMES, THINKING, MISTRAL, f"{MISTRAL} [", f"{MISTRAL}[ARGS]", LLAMA, DEEPSEEK, FENCED]


@pytest.mark.parametrize("template", WRITTEN)
def test_a_call_that_is_asked_for_is_read_back(template: str) -> None:
    """Red where a form and its reader disagree about a mark."""
    new_form = Family(template, TOOLS).form_of_call()
    assert new_form is not None
    form = new_form("weather", {"type": "object"})
    assert form.json_schema == {"type": "object"}
    assert read(template, "", [form.opening + ARGUMENTS + form.closing]) == [PARIS]


@pytest.mark.parametrize("template", [CODER, GLM, HARMONY, ""])
def test_calls_that_no_grammar_says_are_not_asked_for(template: str) -> None:
    assert Family(template, TOOLS).form_of_call() is None
