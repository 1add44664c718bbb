"""Which format a model's answers have, by what its chat template says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from compute_node.gateway.formats import (
    deepseek,
    glm,
    hermes,
    llama3,
    mistral,
    qwen_coder,
    thinking,
)
from compute_node.gateway.formats.arguments import Tools
from compute_node.gateway.formats.calls import Calls, FormOf
from compute_node.gateway.formats.harmony import Harmony
from compute_node.gateway.formats.llama3 import Llama3
from compute_node.gateway.formats.plain import Plain
from compute_node.gateway.formats.said import AnswerFormat
from compute_node.gateway.formats.tagged_calls import TaggedCalls
from compute_node.gateway.refusals import Refused


@dataclass(frozen=True)
class Family:
    """How the models of one template answer."""

    template: str
    tools: Tools = ()

    def check(self) -> None:
        """Raises Refused for tools where nothing says how they are called."""
        if self.tools and ("tools" not in self.template or self._calls() is None):
            raise Refused(
                "tools: this model's chat template does not say how tools are called in a way that "
                "is known here: leave tools out",
                param="tools",
            )

    @property
    def shows_special_tokens(self) -> bool:
        """Whether its marks may be special tokens, so that these must be seen."""
        return self._is_harmony or bool(self.tools) or self._thinks

    def new_format(self, prompt_end: str) -> AnswerFormat:
        """Of one answer. prompt_end: how the prompt ended"""
        if self._is_harmony:
            return Harmony()
        calls = self._calls() if self.tools else None
        inner = calls.new_format() if calls is not None else Plain()
        if not self._thinks:
            return inner
        return thinking.Thinking(inner, opened=prompt_end.rstrip().endswith(thinking.OPENING))

    @property
    def answers_in_one_place(self) -> bool:
        """Whether all of an answer but its thoughts is one text."""
        return not self._is_harmony

    @property
    def thoughts(self) -> tuple[str, str] | None:
        """The marks between which it may think first."""
        return (thinking.OPENING, thinking.CLOSING) if self._thinks else None

    @property
    def _is_harmony(self) -> bool:
        return "<|channel|>" in self.template and "<|message|>" in self.template

    @property
    def _thinks(self) -> bool:
        return thinking.OPENING in self.template or thinking.CLOSING in self.template

    def form_of_call(self) -> FormOf | None:
        """How one call is written; None: not in a way that a grammar can say."""
        calls = self._calls()
        return calls.form if calls is not None else None

    def _calls(self) -> Calls | None:
        """The most particular first: some templates name marks of others, too."""
        template = self.template
        if self._is_harmony:
            return Calls(Harmony)
        if deepseek.OPENING in template:
            marks = deepseek.OPENING, deepseek.CLOSING
            form = partial(deepseek.form, template)
            return Calls(partial(TaggedCalls, *marks, deepseek.parse), form)
        if hermes.OPENING in template:
            return self._in_tool_call()
        if mistral.OPENING in template:
            form = partial(mistral.form, template)
            return Calls(partial(TaggedCalls, mistral.OPENING, "", mistral.parse), form)
        if "<|start_header_id|>" in template and "parameters" in template:
            return Calls(Llama3, llama3.form)
        return None

    def _in_tool_call(self) -> Calls:
        tagged = partial(TaggedCalls, hermes.OPENING, hermes.CLOSING)
        if "<arg_key>" in self.template:
            return Calls(partial(tagged, partial(glm.parse, tools=self.tools)))
        if "<function=" in self.template:
            return Calls(partial(tagged, partial(qwen_coder.parse, tools=self.tools)))
        return Calls(partial(tagged, hermes.parse), hermes.form)


PLAIN = Family("")  # text and nothing else
