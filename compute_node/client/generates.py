"""How a caller asks for text, the same for every client of a node."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from compute_node.client import arguments
from compute_node.client.grammar import Grammar
from proto import compute_node_pb2 as pb

Running = TypeVar("Running")

_NO_BIAS: Mapping[int, float] = MappingProxyType({})
_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


class Generates(ABC, Generic[Running]):
    """Has `generate`. Running: what a generation under way is."""

    @abstractmethod
    def _start(self, request: pb.GenerateRequest, timeout_s: float | None) -> Running:
        """Send the request."""

    def generate(
        self,
        prompt: arguments.Prompt,
        *,
        max_tokens: int | None = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 0.0,
        repetition_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        logit_bias: Mapping[int, float] = _NO_BIAS,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        skip_special_tokens: bool = True,
        max_prompt_tokens: int = 0,
        record: bool = False,
        router_scores: bool = False,
        predictions: bool = False,
        inputs: bool = False,
        route: str = "",
        route_prompts: bool = False,
        quality: str = "",
        log_probs: int | None = None,
        grammar: Grammar | Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        template_options: Mapping[str, Any] = _NO_OPTIONS,
        fits_context: bool = False,
        client: str = "",
        timeout_s: float | None = None,
    ) -> Running:
        """Start generating.

        prompt: text, token ids, or chat messages ({"role": ..., "content": ...}), which may have
                a name, tool_calls, a tool_call_id and reasoning, too
        max_tokens: new ones at most, one or more; None: what the context leaves
        temperature: 0 is greedy, and exact
        stop: one or several strings that end the text and are not part of it
        skip_special_tokens: leave them out of the text; else it shows the one that ends it, too
        max_prompt_tokens: a longer prompt is cut to this many tokens; 0: never
        record: keep what each decode step asked of the experts, in `Result.steps`
        router_scores: record the router's scores of all experts, too
        predictions: record what predictors said of each layer before it was reached, too
        inputs: record what a router map reads, too; part of predictions
        route: of decode: rules joined by +, as in "prior .05 + skip .5"; empty: exact
        route_prompts: the prompt goes by it, too
        quality: by how much perplexity may rise, as in "1%"; "exact"; empty: the node's, unless a
                 route is given
        log_probs: each piece carries its probability, and those of this many likeliest tokens
        grammar: what the answer is held to, whatever the sampling: a JSON schema, or a Grammar
        tools: what a chat's answer may call, as its template has them
        template_options: variables of the chat's template, as {"enable_thinking": False}
        fits_context: cut max_tokens to what the context leaves
        client: whose turn it is, for fair shares; empty: this connection's

        Raises InvalidRequest before anything is sent. Iterating raises what the node ends with.
        """
        request = pb.GenerateRequest(
            max_tokens=None
            if max_tokens is None
            else arguments.count_of("max_tokens", max_tokens, least=1),
            sampling=arguments.sampling_of(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                frequency_penalty=frequency_penalty,
                presence_penalty=presence_penalty,
                min_p=min_p,
                seed=seed,
                logit_bias=logit_bias,
            ),
            stop=arguments.stops_of(stop),
            stop_token_ids=arguments.ids_of("stop_token_ids", stop_token_ids),
            ignore_eos=arguments.flag_of("ignore_eos", ignore_eos),
            show_special_tokens=not arguments.flag_of("skip_special_tokens", skip_special_tokens),
            max_prompt_tokens=arguments.count_of("max_prompt_tokens", max_prompt_tokens),
            recording=arguments.recording_of(
                record, router_scores=router_scores, predictions=predictions, inputs=inputs
            ),
            route=arguments.text_of("route", route),
            route_prompts=arguments.flag_of("route_prompts", route_prompts),
            quality=arguments.text_of("quality", quality),
            log_probs=None if log_probs is None else arguments.count_of("log_probs", log_probs),
            fits_context=arguments.flag_of("fits_context", fits_context) or max_tokens is None,
            client=arguments.text_of("client", client),
            grammar=None if grammar is None else Grammar.of(grammar).to_pb(),
        )
        arguments.set_prompt(request, prompt)
        arguments.set_template(request, tools, template_options)
        arguments.check_size(request)
        return self._start(request, arguments.timeout_of(timeout_s))
