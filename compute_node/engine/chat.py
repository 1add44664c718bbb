"""Chat messages through the tokenizer's own template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compute_node.engine.text import need_tokenizer
from proto import compute_node_pb2 as pb
from proto import errors

_PROMPT_END_CHARACTERS = 64  # enough for what opens an answer
# What apply_chat_template takes beside a template's variables; a caller has no say in these.
_RESERVED = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "max_length",
    "messages",
    "padding",
    "processor_kwargs",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}


@dataclass(frozen=True)
class Chat:
    """messages: as templates read them; options: variables of the template"""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_pb(cls, chat: pb.ChatMessages) -> Chat:
        """Raises InvalidRequest for JSON that is none, or has another form."""
        options = _load("template_options", chat.template_options or "{}", dict)
        if reserved := _RESERVED & options.keys():
            raise errors.InvalidRequest(
                f"template_options has {min(reserved)!r}, which is no variable of a template: "
                "leave it out"
            )
        tools = _load("tools", chat.tools or "[]", list)
        return cls([_message(message) for message in chat.messages], tools, options)


def _message(message: pb.ChatMessage) -> dict[str, Any]:
    """Templates ask whether a key is there: what is empty is left out."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    for key in ("name", "tool_call_id"):
        if text := getattr(message, key):
            found[key] = text
    if message.reasoning:  # templates do not agree on its name
        found["reasoning_content"] = found["thinking"] = message.reasoning
    if message.tool_calls:
        found["tool_calls"] = _load("tool_calls", message.tool_calls, list)
    return found


def _load(name: str, text: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise errors.InvalidRequest(f"{name} is no JSON: {error}") from error
    if not isinstance(value, kind):
        raise errors.InvalidRequest(f"{name} is no JSON {kind.__name__}: give one")
    return value


def encode_chat(tokenizer: Any, chat: Chat) -> tuple[list[int], str]:
    """Token ids of the prompt, and its last characters. Raises InvalidRequest when the tokenizer
    has no template, or the template refuses the messages.
    """
    need_tokenizer(tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        raise errors.InvalidRequest("this model's tokenizer has no chat template: send a prompt")
    try:
        text: str = tokenizer.apply_chat_template(
            chat.messages,
            tools=list(chat.tools) or None,
            tokenize=False,
            add_generation_prompt=True,
            **chat.options,
        )
    except Exception as error:
        raise errors.ChatRefused(f"the chat template refuses these messages: {error}") from error
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids, text[-_PROMPT_END_CHARACTERS:]


def template_of(tokenizer: Any) -> str:
    """Its text, the one for tools where there are several; empty: none."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("tool_use") or template.get("default")
    return template or ""
