"""Both clients of a node, one suite: the same answers, the same errors, the same ways to leave.

Planted faults seen red: an asynchronous client that hands gRPC's own error on, a description
without the template, log probabilities after the temperature.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from compute_node.client.async_client import AsyncNodeClient
from compute_node.client.grammar import Grammar
from compute_node.client.node_client import NodeClient
from compute_node.client.result import Piece, Result
from proto import errors
from tests.chat_model import CHAT_TEMPLATE
from tests.daemons import daemon, node_table, store_table
from tests.stack import wait_for

pytestmark = pytest.mark.system
CHAT = [{"role": "user", "content": "In the beginning"}]
NOWHERE = "unix:/nobody/listens/here"
Ask = Callable[..., tuple[list[Piece], Result]]


@pytest.fixture(scope="module")
def address(chat_store: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="fm-") as folder:
        run = Path(folder)
        with (
            daemon("expert_store", run, store_table(chat_store, run, 100)),
            daemon("compute_node", run, node_table(run, "n", 96), "n") as started,
        ):
            yield started.address


def ask_sync(address: str, prompt: Any, **options: Any) -> tuple[list[Piece], Result]:
    with NodeClient(address) as node:
        generation = node.generate(prompt, **options)
        pieces = list(generation)
        return pieces, generation.run()


def ask_async(address: str, prompt: Any, **options: Any) -> tuple[list[Piece], Result]:
    async def ask() -> tuple[list[Piece], Result]:
        async with AsyncNodeClient(address) as node:
            generation = node.generate(prompt, **options)
            pieces = [piece async for piece in generation]
            return pieces, await generation.run()

    return asyncio.run(ask())


@pytest.fixture(params=[ask_sync, ask_async], ids=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    return request.param  # type: ignore[no-any-return]


def test_both_say_the_same(address: str) -> None:
    options = {"max_tokens": 24, "temperature": 0.8, "seed": 3, "log_probs": 2}
    sync, other = (ask(address, CHAT, **options) for ask in (ask_sync, ask_async))
    assert sync[0] == other[0]
    assert (sync[1].text, sync[1].token_ids) == (other[1].text, other[1].token_ids)
    assert "".join(piece.text for piece in sync[0]) == sync[1].text


def test_log_probs_are_of_the_models_logits(address: str, ask: Ask) -> None:
    """What is asked for beside changes no token, and a temperature no log probability."""
    plain, _ = ask(address, "In the beginning", max_tokens=8)
    pieces, _ = ask(address, "In the beginning", max_tokens=8, log_probs=3)
    assert [piece.token_id for piece in pieces] == [piece.token_id for piece in plain]
    assert all(piece.drawn is None for piece in plain)
    for piece in pieces:
        assert piece.drawn is not None
        assert piece.drawn == piece.likeliest[0]
        assert len(piece.likeliest) == 3
    warm, _ = ask(address, "In the beginning", max_tokens=1, log_probs=3, temperature=50.0, seed=1)
    assert warm[0].likeliest == pieces[0].likeliest


SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"enum": ["x", "é y"]},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_keeps_to_a_schema(address: str, ask: Ask, seed: int) -> None:
    """Log probabilities stay the model's: a schema bars the likeliest first token."""
    options = {"temperature": 1.5, "seed": seed, "max_tokens": 300, "log_probs": 1}
    pieces, result = ask(address, CHAT, grammar=SCHEMA, **options)
    assert result.finish_reason == "stop"
    jsonschema.validate(json.loads(result.text), SCHEMA)
    assert "".join(piece.text for piece in pieces) == result.text
    plain, _ = ask(address, CHAT, **{**options, "max_tokens": 1})
    assert pieces[0].likeliest == plain[0].likeliest
    assert pieces[0].drawn is not None
    assert pieces[0].drawn.log_prob < pieces[0].likeliest[0].log_prob


def test_a_schema_is_kept_whatever_else_is_asked(address: str, ask: Ask) -> None:
    """Greedy, within few tokens, with a stop string, lossily, and ignoring what ends a text."""
    _, greedy = ask(address, CHAT, grammar=SCHEMA, max_tokens=150)
    jsonschema.validate(json.loads(greedy.text), SCHEMA)
    _, again = ask(address, CHAT, grammar=SCHEMA, max_tokens=150, ignore_eos=True)
    assert again.token_ids == greedy.token_ids
    _, cut = ask(address, CHAT, grammar=SCHEMA, max_tokens=4)
    assert (cut.token_ids, cut.finish_reason) == (greedy.token_ids[:4], "length")
    _, stopped = ask(address, CHAT, grammar=SCHEMA, max_tokens=150, stop='"b"')
    assert (stopped.stop, stopped.text) == ('"b"', greedy.text[: greedy.text.index('"b"')])
    words = {"enum": ["light", "é y"]}
    for more in ({"route": "skip .5"}, {"logit_bias": {77: 100.0}}):
        _, result = ask(address, CHAT, grammar=words, max_tokens=20, **more)
        assert json.loads(result.text) in ("light", "é y")
    _, prompted = ask(address, "In the beginning", grammar={"enum": [1, 2]}, max_tokens=9)
    assert prompted.text in ("1", "2")


def test_a_node_says_whether_it_holds_answers(address: str) -> None:
    with NodeClient(address) as node:
        assert node.describe().grammar == "on"


def test_a_stop_string_is_named(address: str, ask: Ask) -> None:
    _, whole = ask(address, "In the beginning", max_tokens=16, ignore_eos=True)
    stop = whole.text[5:8]
    _, result = ask(address, "In the beginning", max_tokens=16, ignore_eos=True, stop=["@@", stop])
    assert (result.finish_reason, result.stop) == ("stop", stop)
    assert result.text == whole.text[: whole.text.index(stop)]


def test_an_answer_may_take_what_the_context_leaves(address: str, ask: Ask) -> None:
    prompt = [5] * 2040
    _, result = ask(address, prompt, max_tokens=None, ignore_eos=True)
    assert (len(result.token_ids), result.finish_reason) == (8, "length")
    _, cut = ask(address, prompt, max_tokens=500, fits_context=True, ignore_eos=True)
    assert cut.token_ids == result.token_ids
    with pytest.raises(errors.ContextExceeded, match="max_context_tokens = 2048"):
        ask(address, prompt, max_tokens=500)
    with pytest.raises(errors.ContextExceeded, match="leaves no room"):
        ask(address, [5] * 2048, max_tokens=None)


def test_a_bias_and_penalties_reach_the_sampler(address: str, ask: Ask) -> None:
    _, result = ask(address, "In", max_tokens=5, logit_bias={77: 100.0}, ignore_eos=True)
    assert result.token_ids == [77] * 5
    _, result = ask(
        address, "In", max_tokens=60, logit_bias={77: 100.0}, frequency_penalty=2.0, ignore_eos=True
    )
    assert 40 < result.token_ids.count(77) < 60
    with pytest.raises(errors.InvalidRequest, match="token id 9000 is beyond the vocabulary"):
        ask(address, "In", logit_bias={9000: 1.0})


def test_a_template_sees_tools_and_options(address: str, ask: Ask) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    _, plain = ask(address, CHAT, max_tokens=1)
    _, offered = ask(address, CHAT, max_tokens=1, tools=tools)
    _, thinking = ask(address, CHAT, max_tokens=1, template_options={"enable_thinking": True})
    assert len(offered.prompt_token_ids) > len(plain.prompt_token_ids) + 10
    assert len(thinking.prompt_token_ids) > len(plain.prompt_token_ids)


@pytest.mark.parametrize(
    ("prompt", "options", "kind", "message"),
    [
        ("In", {"log_probs": 21}, errors.InvalidRequest, "at most 20"),
        ("In", {"grammar": {"not": {}}}, errors.GrammarRefused, "Unimplemented keys"),
        ("In", {"grammar": "{}"}, errors.InvalidRequest, "grammar is of type str"),
        ("In", {"grammar": {"const": {1}}}, errors.InvalidRequest, "the JSON schema is no JSON"),
        ("In", {"grammar": Grammar(())}, errors.InvalidRequest, "0 forms"),
        (CHAT, {"template_options": {"tokenize": True}}, errors.InvalidRequest, "no variable"),
        (
            [*CHAT, {"role": "system", "content": "x"}],
            {},
            errors.ChatRefused,
            "System message must be at the beginning",
        ),
    ],
)
def test_what_the_node_refuses_arrives_typed(
    address: str, ask: Ask, prompt: Any, options: dict[str, Any], kind: type, message: str
) -> None:
    with pytest.raises(kind, match=message):
        ask(address, prompt, **options)


def test_a_node_that_is_away_is_unavailable(ask: Ask) -> None:
    with pytest.raises(errors.Unavailable):
        ask(NOWHERE, "In")


def test_a_node_that_is_away_cannot_describe_itself() -> None:
    async def describe() -> None:
        async with AsyncNodeClient(NOWHERE) as node:
            await node.describe()

    with pytest.raises(errors.Unavailable):
        asyncio.run(describe())


def test_both_describe_the_node(address: str) -> None:
    async def describe() -> Any:
        async with AsyncNodeClient(address) as node:
            return await node.describe(), await node.stats()

    with NodeClient(address) as node:
        found = node.describe()
    other, stats = asyncio.run(describe())
    assert found == other
    assert (found.model, found.max_context_tokens, found.trained_tokens) == (
        "tiny-chat",
        2048,
        2048,
    )
    assert found.chat_template == CHAT_TEMPLATE
    assert found.end_texts == ("<|endoftext|>",)
    assert found.fingerprint == stats.fingerprint


def test_leaving_early_frees_the_node(address: str) -> None:
    """Red when `cancel` does nothing: 1,900 tokens take longer than is waited here."""

    async def leave() -> None:
        async with AsyncNodeClient(address) as node:
            generation = node.generate("In", max_tokens=1900, ignore_eos=True)
            async for _ in generation:
                break
            generation.cancel()
            _, result = await asyncio.to_thread(ask_sync, address, "In", max_tokens=1)
            assert result.queued_s < 0.5

    asyncio.run(leave())
    with NodeClient(address) as node:
        wait_for(lambda: node.stats().queued == 0, 5, "the queue to be empty")
