"""What a Python caller passes, as a message for the node; what cannot be carried is refused by name
before anything is sent.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compute_node.client.sampling_options import MAX_UINT32, SamplingOptions
from proto import compute_node_pb2 as pb
from proto import errors, rpc

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]

_MAX_TIMEOUT_S = 10 * 365 * 86400.0
_MESSAGE_KEYS, _CALLS = {"role", "content"}, "tool_calls"
_MORE_KEYS = {"name", "tool_call_id", "reasoning", _CALLS}


def set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    """Raises InvalidRequest for what is neither text, token ids nor chat messages."""
    if isinstance(prompt, str):
        request.prompt = text_of("prompt", prompt)
        return
    items = items_of("prompt", prompt, "text, a list of token ids, or a list of chat messages")
    if not items:
        raise errors.InvalidRequest("the prompt is empty: give at least one token or message")
    kinds = {isinstance(item, Mapping) for item in items}
    if len(kinds) > 1:
        raise errors.InvalidRequest(
            "the prompt mixes chat messages with other things: give messages alone, or token ids"
        )
    if kinds == {True}:
        messages = [_message(number, item) for number, item in enumerate(items)]
        request.chat.messages.extend(messages)
    else:
        request.token_ids.ids.extend(ids_of("prompt", items))


def set_template(
    request: pb.GenerateRequest,
    tools: Sequence[Mapping[str, Any]],
    template_options: Mapping[str, Any],
) -> None:
    """Raises InvalidRequest for tools or options that no chat's template reads."""
    if not tools and not template_options:
        return
    if request.WhichOneof("input") != "chat":
        raise errors.InvalidRequest(
            "tools and template_options go through a chat's template: give chat messages"
        )
    if tools:
        request.chat.tools = _json("tools", items_of("tools", tools, "a list of tools"))
    if template_options:
        request.chat.template_options = _json("template_options", dict(template_options))


def sampling_of(
    *, seed: int | None, top_k: int, logit_bias: Mapping[int, float], **reals: float
) -> pb.Sampling:
    """reals: by their names in SamplingOptions. Raises InvalidRequest naming the option."""
    options = SamplingOptions(
        top_k=_whole("top_k", top_k),
        seed=None if seed is None else _whole("seed", seed),
        logit_bias=_biases(logit_bias),
        **{name: _real(name, value) for name, value in reals.items()},
    )
    return options.to_pb()


def _biases(given: Any) -> dict[int, float]:
    if not isinstance(given, Mapping):
        raise errors.InvalidRequest(
            f"logit_bias is of type {type(given).__name__}: give a number for each token id"
        )
    return {
        _whole("a token id of logit_bias", token_id): _real(f"logit_bias[{token_id}]", bias)
        for token_id, bias in given.items()
    }


def stops_of(stop: str | Sequence[str]) -> list[str]:
    """One stop string, or several. Raises InvalidRequest."""
    stops = [stop] if isinstance(stop, str) else items_of("stop", stop, "a list of strings")
    if "" in stops:
        raise errors.InvalidRequest("a stop string is empty: leave it out")
    return [text_of(f"stop[{number}]", part) for number, part in enumerate(stops)]


def ids_of(name: str, ids: Iterable[Any]) -> list[int]:
    """Raises InvalidRequest naming the first that is no token id."""
    items = items_of(name, ids, "a list of token ids")
    return [count_of(f"{name}[{number}]", item) for number, item in enumerate(items)]


def count_of(name: str, value: Any, least: int = 0) -> int:
    """A uint32. Raises InvalidRequest."""
    number = _whole(name, value)
    if not least <= number <= MAX_UINT32:
        raise errors.InvalidRequest(f"{name} is {number}: give {least} to {MAX_UINT32}")
    return number


def flag_of(name: str, value: Any) -> bool:
    """Raises InvalidRequest."""
    if not isinstance(value, bool):
        raise errors.InvalidRequest(f"{name} is {value!r}: give True or False")
    return value


def recording_of(record: bool, **parts: bool) -> pb.Recording | None:
    """parts: by the names in proto/compute_node.proto. Raises InvalidRequest, also for parts
    without a recording to keep them in.
    """
    wanted = {name: flag_of(name, value) for name, value in parts.items()}
    if flag_of("record", record):
        return pb.Recording(**wanted)
    for name in (name for name, value in wanted.items() if value):
        raise errors.InvalidRequest(f"{name} are part of a recording: set record, too")
    return None


def timeout_of(timeout_s: float | None) -> float | None:
    """Raises InvalidRequest."""
    if timeout_s is None:
        return None
    value = _real("timeout_s", timeout_s)
    if not 0 < value <= _MAX_TIMEOUT_S:  # NaN is neither
        raise errors.InvalidRequest(f"timeout_s is {value:g}: give seconds above 0, or None")
    return value


def text_of(name: str, value: Any) -> str:
    """Text that UTF-8 can carry. Raises InvalidRequest."""
    if not isinstance(value, str):
        raise errors.InvalidRequest(f"{name} is of type {type(value).__name__}: give text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise errors.InvalidRequest(
            f"{name} has half a surrogate pair at character {error.start}: give valid Unicode"
        ) from error
    return value


def items_of(name: str, value: Any, wanted: str) -> list[Any]:
    """Raises InvalidRequest for what would be taken apart into something else."""
    broken = (str, bytes, bytearray, memoryview, Mapping)
    if isinstance(value, broken) or not isinstance(value, Iterable):
        raise errors.InvalidRequest(f"{name} is of type {type(value).__name__}: give {wanted}")
    return list(value)


def check_size(request: pb.GenerateRequest | pb.ScoreRequest | pb.ForwardRequest) -> None:
    """Raises InvalidRequest for what gRPC would not carry."""
    if request.ByteSize() > rpc.MAX_MESSAGE_BYTES:
        raise errors.InvalidRequest(
            f"the request has {request.ByteSize()} bytes, at most {rpc.MAX_MESSAGE_BYTES} are "
            "carried: shorten it"
        )


def _message(number: int, message: Mapping[Any, Any]) -> pb.ChatMessage:
    name = f"chat message {number}"
    if missing := _MESSAGE_KEYS - message.keys():
        raise errors.InvalidRequest(f"{name} has no {min(missing)!r}: give role and content")
    if extra := message.keys() - _MESSAGE_KEYS - _MORE_KEYS:
        named = ", ".join(sorted(map(repr, extra)))
        carried = ", ".join(sorted(_MESSAGE_KEYS | _MORE_KEYS))
        raise errors.InvalidRequest(f"{name} has {named}: only {carried} are carried")
    texts = {key: text_of(f"{name}'s {key}", message[key]) for key in message if key != _CALLS}
    if calls := message.get(_CALLS):
        what = f"{name}'s {_CALLS}"
        texts[_CALLS] = _json(what, items_of(what, calls, "a list of calls"))
    return pb.ChatMessage(**texts)


def _json(name: str, value: Any) -> str:
    try:
        return text_of(name, json.dumps(value, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise errors.InvalidRequest(f"{name} is no JSON: {error}") from error


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise errors.InvalidRequest(f"{name} is of type {type(value).__name__}: give a whole number")


def _real(name: str, value: Any) -> float:
    if not isinstance(value, (bool, str)):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    raise errors.InvalidRequest(f"{name} is {value!r}: give a number")
