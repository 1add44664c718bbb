"""What an answer is held to: JSON that a schema describes, perhaps within fixed text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from compute_node.client.arguments import text_of
from proto import compute_node_pb2 as pb
from proto import errors


@dataclass(frozen=True)
class Form:
    """One way to answer: `opening`, JSON that keeps to `json_schema`, `closing`.

    json_schema: as JSON Schema 2020-12 has it
    """

    json_schema: Mapping[str, Any]
    opening: str = ""
    closing: str = ""


@dataclass(frozen=True)
class Grammar:
    """An answer has one of `forms`.

    thoughts: the marks between which a model may think before it answers, as ("<think>",
              "</think>"); None: it answers at once
    """

    forms: tuple[Form, ...]
    thoughts: tuple[str, str] | None = None

    @classmethod
    def of(cls, given: Self | Mapping[str, Any]) -> Self:
        """A JSON schema alone is one form. Raises InvalidRequest for what is neither."""
        if isinstance(given, cls):
            return given
        if isinstance(given, Mapping):
            return cls((Form(given),))
        raise errors.InvalidRequest(
            f"grammar is of type {type(given).__name__}: give a JSON schema, or a Grammar"
        )

    def to_pb(self) -> pb.Grammar:
        """Raises InvalidRequest for a schema that is no JSON."""
        opening, closing = self.thoughts or ("", "")
        return pb.Grammar(
            forms=[
                pb.GrammarForm(
                    opening=text_of("opening", form.opening),
                    json_schema=_json(form.json_schema),
                    closing=text_of("closing", form.closing),
                )
                for form in self.forms
            ],
            thoughts_opening=text_of("thoughts", opening),
            thoughts_closing=text_of("thoughts", closing),
        )


def _json(schema: Mapping[str, Any]) -> str:
    try:
        return text_of("the JSON schema", json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise errors.InvalidRequest(f"the JSON schema is no JSON: {error}") from error
