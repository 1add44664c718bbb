"""The body of /v1/messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compute_node.gateway.formats.choose import Family
from compute_node.gateway.held import Held
from compute_node.gateway.refusals import Refused
from compute_node.gateway.tool_choice import forced

_HARMLESS = {"metadata", "service_tier", "container", "betas"}
_DEFAULT_TEMPERATURE = 1.0


class Block(BaseModel):
    """Of a message's content. Types that are not text, tools or thoughts are refused by name."""

    model_config = ConfigDict(extra="allow")  # cache_control, citations, signatures

    type: str
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = Field(default_factory=dict)
    tool_use_id: str = ""
    content: str | list[Block] | None = None


class Message(BaseModel):
    role: Literal["user", "assistant"]
    content: str | list[Block]


class Tool(BaseModel):
    """One of the client's own. Those that Anthropic runs itself have a type, and are refused."""

    model_config = ConfigDict(extra="allow")

    type: str | None = None
    name: str
    description: str = ""
    input_schema: dict[str, Any] = Field(default_factory=dict)


class Choice(BaseModel):
    """disable_parallel_tool_use changes nothing: a call that is insisted on is one."""

    model_config = ConfigDict(extra="allow")

    type: Literal["auto", "any", "tool", "none"]
    name: str = ""


class Thinking(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["enabled", "disabled", "adaptive"]


class MessagesBody(BaseModel):
    """Beside Anthropic's: quality."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)]
    messages: Annotated[list[Message], Field(min_length=1)]
    system: str | list[Block] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    quality: str | None = None

    def check(self) -> None:
        """Raises Refused for what would be answered otherwise than it was asked."""
        for name, value in (self.model_extra or {}).items():
            if name not in _HARMLESS and value not in (None, [], {}):
                raise Refused(f"{name} is not supported: leave it out", param=name)
        if self.messages[-1].role == "assistant":
            raise Refused(
                "the last message is the assistant's: answers are not gone on from",
                param="messages",
            )

    def offered(self) -> list[dict[str, Any]]:
        """The tools as templates show them. Raises Refused for those that Anthropic runs."""
        if self.tool_choice is not None and self.tool_choice.type == "none":
            return []
        return [_tool(number, tool) for number, tool in enumerate(self.tools or ())]

    def held(self, family: Family) -> Held | None:
        """The call that the answer is held to. Raises Refused."""
        if self.tool_choice is None or self.tool_choice.type in ("auto", "none"):
            return None
        return forced(family, self.tool_choice.name if self.tool_choice.type == "tool" else None)

    def options(self) -> dict[str, Any]:
        """As the node's client takes them."""
        given = {
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
            "quality": self.quality,
        }
        return {
            **{name: value for name, value in given.items() if value is not None},
            "temperature": _DEFAULT_TEMPERATURE if self.temperature is None else self.temperature,
            "max_tokens": self.max_tokens,
            "fits_context": True,
            "tools": self.offered(),
            "template_options": self._template_options(),
        }

    def prompt(self) -> list[dict[str, Any]]:
        """Chat messages as templates read them. Raises Refused for what is no text."""
        found = (
            [{"role": "system", "content": _texts("system", self.system)}] if self.system else []
        )
        for number, message in enumerate(self.messages):
            found += _messages(f"messages.{number}", message)
        return found

    def _template_options(self) -> dict[str, Any]:
        if self.thinking is None:
            return {}
        return {"enable_thinking": self.thinking.type != "disabled"}


def _tool(number: int, tool: Tool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise Refused(f"tools.{number} is of type {tool.type}: only your own run", param="tools")
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
    }
    return {"type": "function", "function": function}


def _messages(name: str, message: Message) -> Iterator[dict[str, Any]]:
    """Results of tools are messages of their own, before what the user says."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    for block in message.content:
        if block.type == "tool_result":
            content = _texts(name, block.content or "")
            yield {"role": "tool", "content": content, "tool_call_id": block.tool_use_id}
    left = [block for block in message.content if block.type != "tool_result"]
    if left or not message.content:
        yield _message(name, message.role, left)


def _message(name: str, role: str, blocks: Sequence[Block]) -> dict[str, Any]:
    kinds = ("text",) if role == "user" else ("text", "tool_use", "thinking", "redacted_thinking")
    _check(name, blocks, kinds)
    found: dict[str, Any] = {"role": role, "content": "\n".join(b.text for b in blocks if b.text)}
    if thoughts := "".join(block.thinking for block in blocks):
        found["reasoning"] = thoughts
    if calls := [_call(block) for block in blocks if block.type == "tool_use"]:
        found["tool_calls"] = calls
    return found


def _call(block: Block) -> dict[str, Any]:
    function = {"name": block.name, "arguments": block.input}
    return {"id": block.id, "type": "function", "function": function}


def _texts(name: str, content: str | Sequence[Block] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    _check(name, content, ("text",))
    return "\n".join(block.text for block in content)


def _check(name: str, blocks: Sequence[Block], kinds: Sequence[str]) -> None:
    for block in blocks:
        if block.type not in kinds:
            raise Refused(f"{name} has a block of type {block.type}: it is not understood here")
