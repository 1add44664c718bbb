"""Which tokens may come next, so that an answer keeps to a grammar. The library that knows
(llguidance) is imported when the first request asks for it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compute_node.engine.grammar_rules import rules_of
from compute_node.engine.token_bytes import TokenBytes, check
from compute_node.kernels import heap
from proto import compute_node_pb2 as pb
from proto import errors

ON = "on"
_MAX_BYTES, _MAX_FORMS = 128 * 1024, 128
# Where it is in the rules, the rules once more, and what to set in the library.
_NO_REASON = re.compile(
    r"^at \d+\(\d+\): |failed to compile JSON schema: | 1 \| start: .*"
    r"|\. Enable '.*| <non-verbose/>.*"
)
_BEFORE = ("", "\x02", "a")  # what fixed text is tokenised behind
# Of one request: a state of the lexer takes one or two kilobytes.
_LIMITS: Mapping[str, Any] = {
    "max_lexer_states": 8192,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


class HeldAnswer:
    """What one answer may still say. One thread at a time."""

    def __init__(self, matcher: Any, vocab_size: int, barred_ids: Sequence[int] = ()) -> None:
        """barred_ids: never allowed, though they would end a complete answer"""
        self._matcher, self._vocab_size, self._barred_ids = matcher, vocab_size, list(barred_ids)

    @property
    def is_complete(self) -> bool:
        """Nothing may follow but a token that ends the text."""
        stopped: bool = self._matcher.is_stopped()
        return stopped

    def allowed(self) -> Tensor:
        """Whether each token may come next: [V] bool. Raises GrammarRefused beyond the limits of
        its memory and time.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        flags = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        flags[self._barred_ids] = 0
        return torch.from_numpy(flags.view(np.bool_))

    def accept(self, token_id: int) -> None:
        """It came. Raises GrammarRefused as `allowed` does."""
        self._matcher.consume_token(token_id)
        self._check()

    def copy(self) -> HeldAnswer:
        """Goes its own way from here."""
        return HeldAnswer(self._matcher.deep_copy(), self._vocab_size, self._barred_ids)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise errors.GrammarRefused(
                f"the answer cannot be held to its grammar any further: {_reason(self._matcher)}: "
                "ask for a simpler one"
            )


class Grammars:
    """Of one model. eos_ids: tokens that end a text; vocab_size: V, of its logits

    status: ON, or why answers cannot be held to a grammar
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, eos_ids
        self.status = _status(tokenizer)
        self._lock = threading.Lock()
        self._library_tokenizer: Any = None
        self._special_ids: dict[str, int] = {}

    def begin(self, grammar: pb.Grammar, prompt_end: str, ignore_eos: bool = False) -> HeldAnswer:
        """An answer that has said nothing yet. prompt_end: the prompt's last characters;
        ignore_eos: it ends where nothing more can be said, and not where it might

        Takes milliseconds, and a second or two for the first. Raises GrammarRefused naming what
        cannot be kept exactly, or is too long.
        """
        _check_size(grammar)
        with self._lock:
            if self._library_tokenizer is None:
                self._load()
            rules = rules_of(grammar, prompt_end, self._special_ids)
            matcher = self._compiled(rules)
        return HeldAnswer(matcher, self._vocab_size, sorted(self._eos_ids) if ignore_eos else ())

    def _compiled(self, rules: str) -> Any:
        import llguidance

        limits = llguidance.LLParserLimits(**_LIMITS)
        matcher = llguidance.LLMatcher(self._library_tokenizer, rules, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # finds what can never be said
        if matcher.is_error():
            raise errors.GrammarRefused(
                f"this grammar cannot be kept exactly: {_reason(matcher)}: leave that out"
            )
        return matcher

    def _load(self) -> None:
        import llguidance

        spelling = TokenBytes(self._tokenizer)
        vocabulary: Any = _Vocabulary(self._tokenizer, spelling, self._eos_ids, self._vocab_size)
        self._special_ids = spelling.special_ids
        # Without its slices a mask takes as long, and the vocabulary half the memory.
        self._library_tokenizer = llguidance.LLTokenizer(
            vocabulary, n_vocab=vocabulary.size, eos_token=vocabulary.eos_ids, slices=[]
        )
        heap.trim()


class _Vocabulary:
    """As llguidance takes one. Without a token that ends texts, one beyond the logits stands for
    it.
    """

    is_tokenizer_wrapper, bos_token_id = True, None

    def __init__(
        self, tokenizer: Any, spelling: TokenBytes, eos_ids: frozenset[int], vocab_size: int
    ) -> None:
        self._encode = tokenizer.backend_tokenizer.encode
        self.eos_ids = sorted(eos_ids) or [max(vocab_size, len(spelling.spelled))]
        self.eos_token_id = self.eos_ids[0]
        self.size = max(vocab_size, len(spelling.spelled), self.eos_ids[-1] + 1)
        self.tokens = spelling.spelled + [b""] * (self.size - len(spelling.spelled))
        special = {*spelling.special_ids.values(), *self.eos_ids}
        for number in special:
            self.tokens[number] = b"<%d>" % number
        self.special_token_ids = sorted(special)
        alone = enumerate(spelling.spelled)
        self._signs = {spelled: number for number, spelled in alone if len(spelled) == 1}

    def __call__(self, text: str) -> list[int]:
        """Tokens that spell a grammar's fixed text as the tokenizer does within a text: where it
        puts a space before, behind other signs. None: it cannot be spelled.
        """
        wanted = text.encode()
        for before in _BEFORE:
            ids = self._encode(before + text, add_special_tokens=False).ids
            if found := self._last(ids, wanted):
                return found
        signs = [self._signs.get(wanted[at : at + 1]) for at in range(len(wanted))]
        return [sign for sign in signs if sign is not None] if None not in signs else []

    def _last(self, ids: list[int], wanted: bytes) -> list[int]:
        """Those at the end that spell it."""
        for at in range(len(ids) - 1, -1, -1):
            spelled = b"".join(self.tokens[number] for number in ids[at:])
            if not wanted.endswith(spelled):
                return []
            if spelled == wanted:
                return ids[at:]
        return []


def _status(tokenizer: Any) -> str:
    try:
        check(tokenizer)
    except errors.GrammarRefused as error:
        return f"off: {error}"
    return ON


def _check_size(grammar: pb.Grammar) -> None:
    if not 0 < len(grammar.forms) <= _MAX_FORMS:
        raise errors.GrammarRefused(
            f"a grammar of {len(grammar.forms)} forms: give 1 to {_MAX_FORMS}"
        )
    if grammar.ByteSize() > _MAX_BYTES:
        raise errors.GrammarRefused(
            f"a grammar of {grammar.ByteSize():,} bytes: at most {_MAX_BYTES:,} are taken"
        )


def _reason(matcher: Any) -> str:
    """In one line; what it says of its own state is left out."""
    text = " ".join(matcher.get_error().split())
    return _NO_REASON.sub("", text.replace("NoExtensionBias", "nothing can ever keep to it"))
