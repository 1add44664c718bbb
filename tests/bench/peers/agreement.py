"""Whether engines compute the same model: the likeliest next token after every beginning of a text.

llama.cpp rounds otherwise than torch, so now and then a near tie goes the other way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.bench.peers.engine import Setup
from tests.bench.peers.flashmoe import teacher_forced
from tests.bench.peers.llama_cpp import llama_cpp
from tests.bench.peers.run import Prompt


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Places where both chose the same, and all places."""
    pairs = [
        (a, b)
        for text, other in zip(ours, theirs, strict=True)
        for a, b in zip(text, other, strict=True)
    ]
    return sum(a == b for a, b in pairs), len(pairs)


def likeliest_of_ours(setup: Setup, texts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Decoded token by token, each told the text's own. Raises OSError when it does not start."""
    with teacher_forced(setup) as worker:
        for text in texts:
            tokens = worker.generate(text.token_ids, len(text.token_ids), seed=0)
            yield [token.token_id for token in tokens]


def likeliest_of_llama(setup: Setup, texts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Raises OSError when it does not start."""
    with llama_cpp(setup) as engine:
        for text in texts:
            ends = range(1, len(text.token_ids) + 1)
            yield [engine.likeliest(text.token_ids[:end]) for end in ends]
