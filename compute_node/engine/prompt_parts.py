"""Where a prompt is cut into parts that are computed one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PromptParts:
    """A prompt is cut where its own tokens say so, and wherever a part would get too long. So
    prompts that begin alike are cut alike as far as they agree, and state that was computed of one
    is the other's, bit for bit: torch rounds by the number of rows.

    most:  tokens of a part
    least: a part that ends by a token of `ends` has at least as many
    ends:  ids of special tokens: chat templates end and begin turns with them
    """

    most: int
    least: int
    ends: frozenset[int] = frozenset()

    def cuts(self, token_ids: Sequence[int]) -> Iterator[int]:
        """Where parts end, ascending; all of them end in every longer prompt that begins alike.

        The rest after the last is a part, too, and may be cut further on in a longer prompt.
        """
        start = 0
        for end, token_id in enumerate(token_ids, start=1):
            length = end - start
            if length == self.most or (length >= self.least and token_id in self.ends):
                start = end
                yield end


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Of tokens with a role, such as those that chat templates put around turns; none without a
    tokenizer.
    """
    if tokenizer is None:
        return frozenset()
    added = tokenizer.added_tokens_decoder.items()
    return frozenset((*tokenizer.all_special_ids, *(number for number, t in added if t.special)))
