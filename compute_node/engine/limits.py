"""What a node can be asked for: as long as its context, as wide as its vocabulary."""

from __future__ import annotations

import logging

from compute_node.engine.request import Request
from compute_node.engine.text import check_stops
from compute_node.model.loaded import LoadedModel
from compute_node.moe.route import RoutePolicy
from proto import errors
from proto.checkpoint.trained_context import trained_context_tokens

logger = logging.getLogger(__name__)

_MAX_CHARACTERS_A_TOKEN = 64


class Limits:
    """Of one model and the memory that was planned for it. Every check raises InvalidRequest."""

    def __init__(self, loaded: LoadedModel, max_context_tokens: int, max_rows: int) -> None:
        """max_rows: of one forward pass."""
        config = loaded.model.config
        self._tokenizer = loaded.tokenizer
        self.max_context_tokens = max_context_tokens
        self._max_rows = max_rows
        self.vocab_size = loaded.vocab_size
        self._has_small_records = bool(loaded.spec.variants)
        self.trained_tokens = trained_context_tokens(config)
        if self.trained_tokens and max_context_tokens > self.trained_tokens:
            logger.warning(
                "max_context_tokens exceeds what the model was trained for",
                extra={"tokens": max_context_tokens, "trained_tokens": self.trained_tokens},
            )

    def check(self, request: Request) -> None:
        """Refuse an empty or too long prompt, token ids the model does not have, or a stop string
        that can never come.
        """
        if not request.token_ids:
            raise errors.InvalidRequest("the prompt is empty: give at least one token")
        if request.max_tokens < 1:
            raise errors.InvalidRequest("max_tokens must be at least 1")
        if request.num_tokens > self.max_context_tokens:
            raise errors.ContextExceeded(
                f"a prompt of {len(request.token_ids)} and max_tokens of {request.max_tokens} "
                f"exceed max_context_tokens = {self.max_context_tokens}: shorten one, or raise "
                "the limit in flashmoe.toml and start again"
            )
        if (largest := max(*request.token_ids, *request.sampling.logit_bias, 0)) >= self.vocab_size:
            raise errors.InvalidRequest(
                f"token id {largest} is beyond the vocabulary of {self.vocab_size}"
            )
        self.check_route(request.policy)
        check_stops(self._tokenizer, request.stop, request.skip_special_tokens)

    def fitting_tokens(self, num_prompt: int, wanted: int | None) -> int:
        """How long an answer may be: `wanted`, cut to what the context leaves; None: all it leaves.

        Raises ContextExceeded when the prompt leaves nothing.
        """
        left = self.max_context_tokens - num_prompt
        if left < 1:
            raise errors.ContextExceeded(
                f"a prompt of {num_prompt} tokens leaves no room for an answer within "
                f"max_context_tokens = {self.max_context_tokens}: shorten it, or raise the limit "
                "in flashmoe.toml and start again"
            )
        return left if wanted is None else min(wanted, left)

    def check_route(self, policy: RoutePolicy) -> None:
        """Refuse records of fewer bits where the store has none."""
        if policy.needs_small and not self._has_small_records:
            raise errors.InvalidRequest(
                "the route asks for records of fewer bits, and this store has none: pack the "
                "checkpoint with --variants exact,int4, or leave precision out"
            )

    def check_characters(self, num_characters: int) -> None:
        """Refuse text that no tokenizer makes short enough, before it is tokenised."""
        if num_characters > _MAX_CHARACTERS_A_TOKEN * self.max_context_tokens:
            raise errors.ContextExceeded(
                f"{num_characters} characters cannot fit max_context_tokens = "
                f"{self.max_context_tokens}: shorten the prompt"
            )

    def check_rows(self, num_rows: int) -> None:
        """Refuse more than memory was planned for in one pass."""
        if not 0 < num_rows <= self._max_rows:
            raise errors.InvalidRequest(
                f"num_tokens is {num_rows}, not within 1 and prefill_chunk_tokens = "
                f"{self._max_rows}: send fewer at once"
            )

    def warnings(self, request: Request) -> tuple[str, ...]:
        """What the caller should know of the answer, a sentence each."""
        if self.trained_tokens is None or request.num_tokens <= self.trained_tokens:
            return ()
        return (
            f"prompt and max_tokens make {request.num_tokens} tokens, the model was trained for "
            f"{self.trained_tokens}: what goes beyond may be nonsense",
        )
