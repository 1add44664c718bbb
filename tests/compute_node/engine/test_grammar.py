"""Answers that are held to a grammar: whatever is drawn, it is what was asked for.

Planted faults seen red: no mask, a forecast that moves the answer itself, log probabilities of the
barred logits, white space without an end, a grammar that begins within open thoughts, an end token
allowed though it is ignored, an answer that goes on once it is complete, a schema's own options.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest
import torch

from compute_node.client.grammar import Form, Grammar
from compute_node.client.sampling_options import SamplingOptions
from compute_node.engine.grammar import Grammars, HeldAnswer
from compute_node.engine.request import Request
from compute_node.engine.writer import Writer
from proto import compute_node_pb2 as pb
from proto import errors
from tests.compute_node.engine.test_text import ids_of
from tests.compute_node.engine.test_token_bytes import ALL, word_piece

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "mail": {"type": "string", "pattern": "^[a-z]{1,6}@[a-z]{1,6}\\.org$"},
        "moods": {"type": "array", "items": {"enum": ["glad", "sad é", 3, None]}, "maxItems": 3},
        "home": {"$ref": "#/$defs/place"},
        "either": {"anyOf": [{"type": "boolean"}, {"type": "number", "maximum": 9}]},
    },
    "required": ["name", "age", "mail", "moods", "home", "either"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"street": {"const": 'x " y'}},
            "additionalProperties": False,
        }
    },
}
WEATHER = Form({"type": "object", "properties": {"days": {"type": "integer", "maximum": 9}}})
EXTRA = 7  # logits beyond the vocabulary


def grammars(name: str = "byte-level") -> Grammars:
    tokenizer = ALL[name]
    eos = frozenset({tokenizer.eos_token_id})
    return Grammars(tokenizer, len(tokenizer) + EXTRA, eos)


@pytest.fixture(scope="module")
def made() -> dict[str, Grammars]:
    return {name: grammars(name) for name in ALL}


def begin(
    made: Mapping[str, Grammars], name: str, given: Any, prompt_end: str = "", **options: Any
) -> HeldAnswer:
    return made[name].begin(Grammar.of(given).to_pb(), prompt_end, **options)


def write(name: str, held: HeldAnswer, seed: int, max_tokens: int = 900) -> tuple[str, str]:
    """The text and why it ended, of a model that has no preference among tokens."""
    tokenizer = ALL[name]
    prompt = tuple(ids_of(tokenizer, "a"))
    sampling = SamplingOptions(temperature=1.5, seed=seed)
    request = Request(prompt, max_tokens, sampling, held=held)
    writer = Writer(request, tokenizer, frozenset({tokenizer.eos_token_id}))
    ids, logits = list(prompt), torch.Generator().manual_seed(seed)
    text = ""
    while not writer.finish_reason:
        row = torch.randn(1, len(tokenizer) + EXTRA, generator=logits)
        text += writer.next(ids, row).text
    return text + writer.flush(), writer.finish_reason


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(6))
def test_an_answer_keeps_to_its_schema(made: dict[str, Grammars], name: str, seed: int) -> None:
    text, reason = write(name, begin(made, name, PERSON), seed)
    assert reason == "stop", text
    jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize("name", ALL)
def test_any_object_is_an_object(made: dict[str, Grammars], name: str) -> None:
    ended = 0
    for seed in range(12):
        text, reason = write(name, begin(made, name, {"type": "object"}), seed, 400)
        assert text.startswith("{")
        if reason == "stop":
            ended += 1
            assert isinstance(json.loads(text), dict)
    assert ended


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("seed", range(4))
def test_text_stands_around_it(made: dict[str, Grammars], name: str, seed: int) -> None:
    """A special token, one that is none, and text, whichever of the forms."""
    forms = (Form(WEATHER.json_schema, '<|end|>{"ä": ', "}<|end|>"), Form(PERSON, "<tool>\n"))
    held = begin(made, name, Grammar(forms))
    tokenizer = ALL[name]
    ids: list[int] = []
    dice = torch.Generator().manual_seed(seed)
    while not held.is_complete:
        ids.append(int(torch.multinomial(held.allowed().double(), 1, generator=dice)))
        held.accept(ids[-1])
    text = tokenizer.decode(ids)
    if ids[0] == tokenizer.convert_tokens_to_ids("<|end|>"):
        inner = text.removeprefix("<|end|>").removesuffix("<|end|>")
        jsonschema.validate(json.loads(inner)["ä"], WEATHER.json_schema)
    else:
        jsonschema.validate(json.loads(text.removeprefix("<tool>\n")), PERSON)


MARKS = [("<t>", "</t>"), ("<|pad|>", "<|end|>"), ("<tool>", "<|end|>"), ("<|end|>", "</t>")]


@pytest.mark.parametrize(("opening", "closing"), MARKS)
def test_thoughts_come_first_where_they_are_open(
    made: dict[str, Grammars], opening: str, closing: str
) -> None:
    """They may hold what is no JSON; behind them the grammar begins."""
    given = Grammar((WEATHER,), (opening, closing))
    thoughts, answer = "Hm, <b> é 世 {", '{"days": 3}'
    for prompt_end, text, is_taken in [
        (f"x{opening}\n", f"{thoughts}{closing}\n\n{answer}", True),
        (f"x{opening}\n", f"{closing}{answer}", True),
        (f"x{opening}\n", f"{thoughts}{closing}{thoughts}", False),
        ("x", answer, True),
        ("x", f"{opening}{thoughts}{closing}\n{answer}", True),
        ("x", f"{thoughts}{closing}{answer}", False),
        (f"{closing}\n\n", f"{opening}{closing}{answer}", False),
        (f"{closing}\n\n", answer, True),
    ]:
        held = begin(made, "byte-level", given, prompt_end)
        assert takes(held, ids_of(ALL["byte-level"], text)) == is_taken, (prompt_end, text)


def takes(held: HeldAnswer, ids: list[int]) -> bool:
    """The whole of it, and nothing can follow."""
    for token_id in ids:
        if held.is_complete or not held.allowed()[token_id]:
            return False
        held.accept(token_id)
    return held.is_complete


def test_it_ends_where_it_may_and_where_it_must(made: dict[str, Grammars]) -> None:
    """A number may go on; with ignore_eos it goes on as long as it can."""
    tokenizer = ALL["byte-level"]
    given = {"type": "integer", "minimum": 0, "maximum": 99}
    (one,), eos = ids_of(tokenizer, "1"), tokenizer.eos_token_id
    held = begin(made, "byte-level", given)
    assert not held.allowed()[eos]
    held.accept(one)
    assert held.allowed()[eos]
    stays = begin(made, "byte-level", given, ignore_eos=True)
    stays.accept(one)
    assert not stays.allowed()[eos]
    stays.accept(one)
    assert stays.is_complete
    held.accept(eos)
    assert held.is_complete


def test_without_an_end_token_it_ends_where_nothing_can_follow() -> None:
    tokenizer = ALL["byte-level"]
    held = Grammars(tokenizer, len(tokenizer), frozenset()).begin(
        Grammar.of({"const": 12}).to_pb(), ""
    )
    assert takes(held, ids_of(tokenizer, "12"))


def test_a_copy_goes_its_own_way(made: dict[str, Grammars]) -> None:
    tokenizer = ALL["byte-level"]
    held = begin(made, "byte-level", {"enum": ["ab", "cd"]})
    other = held.copy()
    for token_id in ids_of(tokenizer, '"c'):
        other.accept(token_id)
    assert takes(held, ids_of(tokenizer, '"ab"'))
    assert not other.is_complete


def test_white_space_between_signs_has_an_end(made: dict[str, Grammars]) -> None:
    """Else a model that only ever indents would never finish."""
    tokenizer = ALL["byte-level"]
    held = begin(made, "byte-level", {"type": "object", "required": ["a"]})
    (brace,), (newline,), (space,) = (ids_of(tokenizer, sign) for sign in ("{", "\n", " "))
    held.accept(brace)
    held.accept(newline)
    for _ in range(32):
        assert held.allowed()[space]
        held.accept(space)
    assert not held.allowed()[[space, newline]].any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"not": {"type": "string"}}, r"Unimplemented keys: \[.not.\]"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"type": "string", "format": "isbn"}, "Unknown format: isbn"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"$ref": "http://example.com/x"}, "http://example.com/x"),
        ({"$ref": "#/definitions/x"}, "/definitions/x"),
        ({"$ref": "#"}, "nothing can ever keep to it"),
        ({"type": "integer", "minimum": 4, "maximum": 2}, "Unsatisfiable"),
        ({"type": "object", "x-guidance": {"lenient": True}}, "x-guidance"),
    ],
)
def test_what_cannot_be_kept_is_named(
    made: dict[str, Grammars], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(errors.GrammarRefused, match=message) as refused:
        begin(made, "byte-level", given)
    assert "start:" not in str(refused.value)


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ([], "0 forms"),
        ([pb.GrammarForm(json_schema="{}")] * 129, "129 forms"),
        ([pb.GrammarForm(json_schema=json.dumps({"description": "x" * 131072}))], "bytes"),
        ([pb.GrammarForm(json_schema="{")], "no JSON"),
        ([pb.GrammarForm(json_schema="[" * 100000)], "no JSON"),
        ([pb.GrammarForm(json_schema="[]")], "no object"),
    ],
)
def test_what_is_too_much_or_no_schema_is_refused(
    made: dict[str, Grammars], forms: list[pb.GrammarForm], message: str
) -> None:
    with pytest.raises(errors.InvalidRequest, match=message):
        made["byte-level"].begin(pb.Grammar(forms=forms), "")


def test_a_tokenizer_that_cannot_be_known_is_said_at_once() -> None:
    assert grammars().status == "on"
    assert Grammars(word_piece(), 99, frozenset()).status.startswith("off: tokens of a WordPiece")
    assert Grammars(None, 99, frozenset()).status.startswith("off: this node has no tokenizer")
    with pytest.raises(errors.GrammarRefused, match="WordPiece"):
        Grammars(word_piece(), 99, frozenset()).begin(Grammar.of({}).to_pb(), "")


def test_a_forecast_draws_what_will_be_drawn(made: dict[str, Grammars]) -> None:
    """Also beyond the end, where it is a guess like any other."""
    tokenizer = ALL["byte-level"]
    sampling = SamplingOptions(temperature=1.5, seed=3)
    request = Request((5,), 64, sampling, held=begin(made, "byte-level", {"enum": ["abc", 17]}))
    writer = Writer(request, tokenizer, frozenset({tokenizer.eos_token_id}))
    rows = torch.randn(64, 1, len(tokenizer), generator=torch.Generator().manual_seed(1))
    rows = torch.nn.functional.pad(rows, (0, EXTRA))
    ids = [5]
    draw = writer.new_draw(ids)
    foreseen = [draw(row) for row in rows]
    for row in rows:
        writer.next(ids, row)
        if writer.finish_reason:
            break
    assert writer.finish_reason == "stop"
    assert foreseen[: len(ids) - 1] == ids[1:]


def test_log_probs_are_the_models_own(made: dict[str, Grammars]) -> None:
    """A barred token stays the likeliest, and what is drawn as unlikely as it was."""
    tokenizer = ALL["byte-level"]
    held = begin(made, "byte-level", {"const": True})
    request = Request((5,), 1, held=held, log_probs=1)
    logits = torch.zeros(1, len(tokenizer) + EXTRA)
    logits[0, 99] = 20.0
    token = Writer(request, tokenizer, frozenset()).next([5], logits)
    assert token.log_probs is not None
    assert token.log_probs.likeliest[0].token_id == 99 != token.token_id
    assert token.log_probs.drawn.log_prob < -19
