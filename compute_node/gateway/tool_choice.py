"""A call of a tool that the client insists on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from compute_node.client.grammar import Form
from compute_node.gateway.formats.calls import FormOf
from compute_node.gateway.formats.choose import Family
from compute_node.gateway.held import Held
from compute_node.gateway.refusals import Refused

_PARAM = "tool_choice"
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


def forced(family: Family, name: str | None) -> Held:
    """One call of the tool called `name`, of those that the family is offered; None: of any.

    Raises Refused where there is none, or its calls are not written as JSON.
    """
    chosen = [tool for tool in family.tools if name in (None, tool["function"]["name"])]
    if not chosen:
        missing = f"no tool is called {name!r}" if name is not None else "no tool is offered"
        raise Refused(f"{_PARAM}: {missing}: give it in tools", param=_PARAM)
    family.check()
    form = family.form_of_call()
    if form is None:
        raise Refused(
            f"{_PARAM}: this model does not write the arguments of calls as JSON, or in channels: "
            "only none and auto are supported",
            param=_PARAM,
        )
    return Held(tuple(_forms(form, chosen)), _PARAM)


def _forms(form: FormOf, tools: Sequence[Mapping[str, Any]]) -> list[Form]:
    return [form(_name(tool["function"]), _parameters(tool["function"])) for tool in tools]


def _name(function: Mapping[str, Any]) -> str:
    name: str = function["name"]
    if _NAME.fullmatch(name) is None:
        raise Refused(
            f"{_PARAM}: {name!r} is no name that can be held to: use letters, digits, _, . and -",
            param="tools",
        )
    return name


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema of an object, whatever else it says."""
    found = function.get("parameters") or {}
    if not isinstance(found, Mapping) or found.get("type", "object") != "object":
        raise Refused(
            f"{_PARAM}: the parameters of {function['name']} are no schema of an object",
            param="tools",
        )
    return {"type": "object", **found}
