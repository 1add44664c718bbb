"""What an answer is held to, and the field of the request that asks for it."""

from __future__ import annotations

from dataclasses import dataclass

from compute_node.client.description import Description
from compute_node.client.grammar import Form, Grammar
from compute_node.gateway.formats.choose import Family
from compute_node.gateway.refusals import Refused

_ON = "on"


@dataclass(frozen=True)
class Held:
    """The answer has one of `forms`. param: the field, for errors"""

    forms: tuple[Form, ...]
    param: str

    def grammar(self, family: Family, description: Description) -> Grammar:
        """Raises Refused where this node or this model's answers cannot be held to any."""
        if description.grammar != _ON:
            reason = description.grammar.removeprefix("off: ")
            raise Refused(f"{self.param}: {reason}", param=self.param)
        if not family.answers_in_one_place:
            raise Refused(
                f"{self.param}: this model answers in channels, and what comes before the final "
                "one is not known: leave it out",
                param=self.param,
            )
        return Grammar(self.forms, family.thoughts)

    def refused(self, error: Exception) -> Refused:
        """What the node says of the grammar."""
        return Refused(f"{self.param}: {error}", param=self.param)
