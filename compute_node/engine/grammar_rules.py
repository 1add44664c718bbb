"""A grammar in the language of llguidance: https://guidance-ai.github.io/llguidance/syntax"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from proto import compute_node_pb2 as pb
from proto import errors

# Between JSON's signs, with an end: a model that only ever indents would never finish.
_SPACE = r"[ \t]{0,2}(\r?\n[ \t]{0,32})?"
_OPTIONS = "x-guidance"  # a schema's own would change what is kept


def rules_of(grammar: pb.Grammar, prompt_end: str, special_ids: Mapping[str, int]) -> str:
    """prompt_end: whether thoughts have begun, or are over, is seen there
    special_ids: of special tokens by their text, which no other tokens spell

    Raises GrammarRefused for a schema that is no JSON object.
    """
    names = [f"form{number}" for number in range(len(grammar.forms))]
    rules = [f"answer: {' | '.join(names)}"]
    for name, form in zip(names, grammar.forms, strict=True):
        parts = [*_text(form.opening, special_ids), _json(form), *_text(form.closing, special_ids)]
        rules.append(f"{name}: {' '.join(parts)}")
    return "\n".join([*_start(grammar, prompt_end.rstrip(), special_ids), *rules])


def _start(grammar: pb.Grammar, prompt_end: str, special_ids: Mapping[str, int]) -> Iterator[str]:
    opening, closing = grammar.thoughts_opening, grammar.thoughts_closing
    if not opening or prompt_end.endswith(closing):
        yield "start: answer"
        return
    if prompt_end.endswith(opening):
        yield "start: thoughts answer"
    else:
        yield f"start: ({' '.join(_text(opening, special_ids))} thoughts)? answer"
    space = r"/[ \n]{0,4}/"
    if closing in special_ids:
        yield f"thoughts: thought {' '.join(_text(closing, special_ids))} {space}"
        yield "thought: /(?s:.*)/"
    else:
        yield f"thoughts: thought {space}"
        yield f"thought[suffix={json.dumps(closing)}]: /(?s:.*)/"


def _json(form: pb.GrammarForm) -> str:
    try:
        schema: Any = json.loads(form.json_schema)
    except (ValueError, RecursionError) as error:
        raise errors.GrammarRefused(f"the JSON schema is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise errors.GrammarRefused("the JSON schema is no object: give one")
    if _OPTIONS in schema:
        raise errors.GrammarRefused(f"the JSON schema has {_OPTIONS!r}: leave it out")
    options = {"whitespace_pattern": _SPACE, "lenient": False, "coerce_one_of": False}
    return f"%json {json.dumps({**schema, _OPTIONS: options})}"


def _text(text: str, special_ids: Mapping[str, int]) -> Iterator[str]:
    """Special tokens by their ids, what is between them as text."""
    marks = sorted((mark for mark in special_ids if mark in text), key=len, reverse=True)
    for part in re.split(f"({'|'.join(map(re.escape, marks))})", text) if marks else [text]:
        if part in special_ids:
            yield f"<[{special_ids[part]}]>"
        elif part:
            yield json.dumps(part)
