"""How one family of models calls tools: how answers are read, and how a call can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from compute_node.client.grammar import Form
from compute_node.gateway.formats.said import AnswerFormat

# Of a tool's name and its parameters, a JSON schema.
FormOf = Callable[[str, Mapping[str, Any]], Form]


@dataclass(frozen=True)
class Calls:
    """new_format: reads one answer

    form: one call, with nothing around it; None: its arguments are no JSON, or what comes before it
          is not known
    """

    new_format: Callable[[], AnswerFormat]
    form: FormOf | None = None
