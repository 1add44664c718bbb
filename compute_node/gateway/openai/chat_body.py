"""The body of /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compute_node.client.grammar import Form
from compute_node.gateway.formats.choose import Family
from compute_node.gateway.held import Held
from compute_node.gateway.openai.fields import Generated
from compute_node.gateway.refusals import Refused
from compute_node.gateway.tool_choice import forced

MAX_LIKELIEST = 20
_FORMAT = "response_format"
_ANY_OBJECT = {"type": "object"}


class Part(BaseModel):
    """Of a message's content. Other types than text are refused by name."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None
    refusal: str | None = None


class Function(BaseModel):
    name: str
    arguments: str = ""


class ToolCall(BaseModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(BaseModel):
    """Of a conversation. What a role has no use for is left out by clients, or null."""

    model_config = ConfigDict(extra="ignore")  # clients send back what they were answered

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None


class JsonSchema(BaseModel):
    """strict and description change nothing: every schema is kept."""

    model_config = ConfigDict(extra="allow")

    definition: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def form(self) -> Form | None:
        """None: text. Raises Refused without a schema."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Form(_ANY_OBJECT)
        if self.json_schema is None:
            name = f"{_FORMAT}.json_schema"
            raise Refused(f"{name} is missing: give a schema", param=name)
        return Form(self.json_schema.definition or _ANY_OBJECT)


class ChatBody(Generated):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LIKELIEST)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        if self.offered() and self._form() is not None:
            raise Refused(
                f"{_FORMAT} with tools: an answer is held to a format or calls a tool: set "
                "tool_choice to none, or leave one out",
                param=_FORMAT,
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused("top_logprobs are for logprobs = true", param="top_logprobs")

    def offered(self) -> list[dict[str, Any]]:
        """The tools that the template shows. Raises Refused for one that is no function."""
        if self.tool_choice == "none":
            return []
        for number, tool in enumerate(self.tools or ()):
            function = tool.get("function")
            if tool.get("type") != "function" or not isinstance(function, dict):
                raise Refused(f"tools.{number} is no function", param="tools")
            if not isinstance(function.get("name"), str):
                raise Refused(f"tools.{number}.function has no name", param="tools")
        return self.tools or []

    def held(self, family: Family) -> Held | None:
        """What the answer is held to: a format, or a call. Raises Refused."""
        match self.tool_choice:
            case None | "none" | "auto":
                form = self._form()
                return Held((form,), _FORMAT) if form is not None else None
            case "required":
                return forced(family, None)
            case {"type": "function", "function": {"name": str(name)}}:
                return forced(family, name)
        raise Refused(
            "tool_choice: none, auto, required and a function are supported", param="tool_choice"
        )

    def _form(self) -> Form | None:
        return self.response_format.form() if self.response_format is not None else None

    def template_options(self) -> dict[str, Any]:
        effort = {} if self.reasoning_effort is None else _effort(self.reasoning_effort)
        return {**effort, **(self.chat_template_kwargs or {})}

    def options(self) -> dict[str, Any]:
        """As the node's client takes them."""
        return {
            **self.sampling(),
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "log_probs": (self.top_logprobs or 0) if self.logprobs else None,
            "tools": self.offered(),
            "template_options": self.template_options(),
        }

    def prompt(self) -> list[dict[str, Any]]:
        """Chat messages as templates read them. Raises Refused for what is no text."""
        return [_message(number, message) for number, message in enumerate(self.messages)]


def _effort(effort: str) -> dict[str, Any]:
    """As templates call it: none of it is no thoughts."""
    if effort in ("none", "minimal"):
        return {"enable_thinking": False, "reasoning_effort": "low"}
    return {"reasoning_effort": effort}


def _message(number: int, message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": _content(number, message.content)}
    if message.content is None and not message.tool_calls:
        raise Refused(f"messages.{number} has no content", param=f"messages.{number}.content")
    for key, value in (("name", message.name), ("tool_call_id", message.tool_call_id)):
        if value:
            found[key] = value
    if message.reasoning_content:
        found["reasoning"] = message.reasoning_content
    if message.tool_calls:
        found["tool_calls"] = [_call(number, call) for call in message.tool_calls]
    return found


def _content(number: int, content: str | Sequence[Part] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for place, part in enumerate(content):
        text = part.text if part.type == "text" else part.refusal
        if part.type not in ("text", "refusal") or text is None:
            name = f"messages.{number}.content.{place}"
            raise Refused(f"{name} is of type {part.type}: only text is understood", param=name)
        texts.append(text)
    return "\n".join(texts)


def _call(number: int, call: ToolCall) -> dict[str, Any]:
    """Templates want arguments as an object. Raises Refused for those that are none."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        name = f"messages.{number}.tool_calls"
        raise Refused(f"{name}: the arguments of {call.function.name} are no object", param=name)
    function = {"name": call.function.name, "arguments": arguments}
    found: dict[str, Any] = {"type": "function", "function": function}
    return {"id": call.id, **found} if call.id else found
