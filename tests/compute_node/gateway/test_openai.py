"""OpenAI's interface over a real stack: what it answers is what the node says, and what it cannot
do is refused by name.

Planted faults seen red: a stream that ends without its last held-back text, unknown fields ignored,
an answer cut at 16 tokens in a chat, keys that are not asked for.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from compute_node.gateway.openai.chat_body import ChatBody
from tests.compute_node.gateway.conftest import Caller
from tests.stack import ServedStack, served, wait_for

pytestmark = pytest.mark.system
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "In the beginning"}]
GREEDY = {"messages": MESSAGES, "temperature": 0, "max_tokens": 24}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def test_a_chat_is_what_the_node_says(caller: Caller, stack: ServedStack) -> None:
    with stack.client() as node:
        expected = node.generate(MESSAGES, max_tokens=24).run()
    status, found = caller.ask(CHAT, GREEDY)
    assert status == 200
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    assert choice["finish_reason"] == expected.finish_reason
    usage = found["usage"]
    assert usage["prompt_tokens"] == len(expected.prompt_token_ids)
    assert usage["completion_tokens"] == len(expected.token_ids)
    assert found["model"] == "tiny-chat"
    assert found["flashmoe"]["quality"] == "exact"


def test_a_stream_is_the_same(caller: Caller) -> None:
    _, whole = caller.ask(CHAT, GREEDY)
    *events, done = caller.events(CHAT, {**GREEDY, "stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    texts = [c["delta"].get("content", "") for e in events for c in e["choices"]]
    assert "".join(texts) == whole["choices"][0]["message"]["content"]
    reasons = [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]]
    assert reasons == [whole["choices"][0]["finish_reason"]]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert len({event["id"] for event in events}) == 1


def test_text_that_was_held_back_comes_at_the_end(caller: Caller, stack: ServedStack) -> None:
    """`<` begins marks of this model, until nothing follows it."""
    with stack.client() as node:
        (mark,) = node.generate("<", max_tokens=1).run().prompt_token_ids
    *events, _ = caller.events(CHAT, {**GREEDY, "max_tokens": 1, "logit_bias": {mark: 100}})
    assert "".join(c["delta"].get("content", "") for e in events for c in e["choices"]) == "<"


def test_a_chat_without_a_limit_has_none() -> None:
    assert ChatBody.model_validate({"messages": MESSAGES}).options()["max_tokens"] is None


@pytest.mark.parametrize("prompt", ["In the beginning", ["In the beginning"], None])
def test_a_completion_takes_text_and_token_ids(
    caller: Caller, stack: ServedStack, prompt: Any
) -> None:
    with stack.client() as node:
        expected = node.generate("In the beginning", max_tokens=16).run()
    body = {"prompt": prompt or expected.prompt_token_ids, "temperature": 0}
    _, found = caller.ask(COMPLETIONS, body)
    assert found["choices"][0]["text"] == expected.text
    *events, _ = caller.events(COMPLETIONS, body)
    assert "".join(c["text"] for e in events for c in e["choices"]) == expected.text


def test_log_probs_cover_every_token(caller: Caller) -> None:
    wanted = {**GREEDY, "logprobs": True, "top_logprobs": 2}
    _, whole = caller.ask(CHAT, wanted)
    entries = whole["choices"][0]["logprobs"]["content"]
    assert len(entries) == whole["usage"]["completion_tokens"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    *events, _ = caller.events(CHAT, wanted)
    streamed = [c["logprobs"] for e in events for c in e["choices"] if c["logprobs"]]
    assert [entry for one in streamed for entry in one["content"]] == entries
    _, older = caller.ask(COMPLETIONS, {"prompt": "In", "temperature": 0, "logprobs": 1})
    log_probs = older["choices"][0]["logprobs"]
    assert "".join(log_probs["tokens"]) == older["choices"][0]["text"]


def test_thoughts_that_the_template_opens_are_apart(caller: Caller) -> None:
    body = {**GREEDY, "chat_template_kwargs": {"enable_thinking": True}}
    _, found = caller.ask(CHAT, body)
    message = found["choices"][0]["message"]
    assert message["content"] == ""
    assert message["reasoning_content"]
    *events, _ = caller.events(CHAT, body)
    deltas = [c["delta"].get("reasoning_content", "") for e in events for c in e["choices"]]
    assert "".join(deltas) == message["reasoning_content"]


def test_a_system_message_that_the_template_refuses_goes_with_the_users(caller: Caller) -> None:
    late = [*MESSAGES, {"role": "system", "content": "Be brief."}, *MESSAGES]
    merged = [*MESSAGES, {"role": "user", "content": "Be brief.\n\nIn the beginning"}]
    answers = [caller.ask(CHAT, {**GREEDY, "messages": m})[1]["choices"] for m in (late, merged)]
    assert answers[0] == answers[1]


def test_a_seed_makes_it_the_same_again(caller: Caller) -> None:
    body = {**GREEDY, "temperature": None, "seed": -5}
    first, second = (caller.ask(CHAT, body)[1]["choices"] for _ in range(2))
    assert first == second
    assert caller.ask(CHAT, {**body, "seed": 6})[1]["choices"] != first


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"n": 2}, 400, "n is 2"),
        ({"model": "gpt-4"}, 404, "'gpt-4' is not served here: use 'tiny-chat'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 200_000}]}, 400, "max_context_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "image_url"),
        ({"audio": {"voice": "alloy"}}, 400, "audio is not supported"),
        ({"tool_choice": "required"}, 400, "tool_choice: no tool is offered"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools.0 is no function"),
        ({"stop": [""]}, 400, "a stop string is empty"),
        ({"stop": ["x"] * 17}, 400, "17 stop strings"),
        ({"temperature": 3}, 400, "temperature"),
        ({"logit_bias": {"9000": 1}}, 400, "9000 is beyond the vocabulary"),
        ({"top_logprobs": 2}, 400, "top_logprobs are for logprobs"),
        ({"quality": "1%"}, 400, "quality"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    caller: Caller, change: dict[str, Any], status: int, said: str
) -> None:
    found = caller.ask(CHAT, {**GREEDY, **change})
    assert found[0] == status
    assert said in found[1]["error"]["message"]
    if "stream_options" not in change:
        assert caller.ask(CHAT, {**GREEDY, **change, "stream": True})[0] == status


def test_harmless_fields_are_ignored(caller: Caller) -> None:
    more = {"user": "bob", "store": False, "metadata": {"a": "b"}, "service_tier": "auto"}
    assert caller.ask(CHAT, {**GREEDY, **more, "audio": None})[0] == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"messages": 5}', b"\xff\xfe", b"[" * 10_000])
def test_bodies_that_are_none_are_refused(caller: Caller, body: bytes) -> None:
    status, _, _ = caller.send(CHAT, body)
    assert status == 400


def test_too_long_a_body_is_refused_before_it_is_read(caller: Caller) -> None:
    status, found = caller.ask(CHAT, b"x", **{"Content-Length": str(5 << 20)})
    assert (status, found["error"]["code"]) == (413, "request_too_large")


def test_a_client_that_leaves_frees_the_node(caller: Caller, stack: ServedStack) -> None:
    """Red when only streams look whether their client is still there."""
    port = int(stack.url.rsplit(":", 1)[1])
    for stream in ("true", "false"):
        body = (
            f'{{"messages": [{{"role": "user", "content": "In"}}], "stream": {stream}, '
            '"ignore_eos": true, "max_tokens": 1900}'
        ).encode()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
            connection.sendall(f"{head}\r\n\r\n".encode() + body)
            with stack.client() as node:
                wait_for(lambda: node.stats().live > 0, 10, "the answer to begin")
        with stack.client() as node:
            wait_for(lambda: node.stats().live == 0, 2, "the node to stop")


def test_other_sites_pages_and_names_are_kept_out(caller: Caller) -> None:
    assert caller.ask("/v1/models", Origin="https://evil.example")[0] == 403
    assert caller.ask("/v1/models", Host="evil.example")[0] == 403
    assert caller.ask("/v1/models", Origin=caller.url)[0] == 200
    assert caller.ask("/health/live", Host="evil.example")[0] == 200


def test_keys_are_asked_for(chat_store: Path, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a-long-secret\n")
    flags = ("--http", "0", "--api-key-file", str(tmp_path / "keys"))
    origins = ("--cors-origin", "https://chat.example")
    with served(chat_store, run_dir, *flags, *origins) as stack:
        caller = Caller(stack.url)
        for path in ("/v1/models", CHAT, "/metrics", "/live"):
            assert caller.ask(path, None if path != CHAT else GREEDY)[0] == 401, path
        assert caller.ask("/v1/models", Authorization="Bearer a-long-secre")[0] == 401
        assert caller.ask("/v1/models", Authorization="Bearer a-long-secret")[0] == 200
        assert caller.ask("/health/ready")[0] == 200
        status, _, headers = caller.send(
            "/v1/models",
            headers={"Origin": "https://chat.example", "Authorization": "Bearer a-long-secret"},
        )
        assert (status, headers["access-control-allow-origin"]) == (200, "https://chat.example")
        assert "a-long-secret" not in stack.run.log("gateway").read_text()


def test_the_log_has_no_text_of_prompts(caller: Caller, stack: ServedStack) -> None:
    caller.ask(CHAT, {**GREEDY, "messages": [{"role": "user", "content": "Zanzibar"}]})
    log = stack.run.log("gateway").read_text()
    assert "/v1/chat/completions" in log
    assert "Zanzibar" not in log
