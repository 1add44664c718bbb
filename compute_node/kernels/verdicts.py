"""Verdicts on native entries: whether and how each gives torch's bits, and whether it is faster."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_RATIO = 1.05  # a kernel that takes longer than this many times torch's time is not used

Key = tuple[Any, ...]


class Verdict(NamedTuple):
    """way:   how the kernel gets torch's bits; 0: it has others
    ratio: the kernel's time divided by torch's; 0: they were not timed
    """

    way: int
    ratio: float = 0.0

    @property
    def chosen(self) -> int:
        """`way`, unless the kernel is slower; 0: torch computes."""
        return self.way if self.ratio <= MAX_RATIO else 0


class Verdicts:
    """Of one entry. A key says what the bits depend on: shape, dtype, bias, tokens, threads."""

    def __init__(self, entry: str) -> None:
        self.entry = entry
        self.known: dict[Key, Verdict] = {}
        self.num_proofs = 0

    def ask(self, key: Key, compare: Callable[[], Verdict]) -> Verdict:
        """What is known of `key`; for the first of it, what `compare` finds by trying the kernel
        beside torch.
        """
        verdict = self.known.get(key)
        if verdict is None:
            verdict = self.known[key] = compare()
            self.num_proofs += 1
            self._log(key, verdict)
        return verdict

    def count(self, native: bool) -> int:
        """Keys asked for or read from a file that the kernel computes, or that torch does."""
        return [verdict.chosen > 0 for verdict in self.known.copy().values()].count(native)

    def _log(self, key: Key, verdict: Verdict) -> None:
        if verdict.chosen and self.entry != "gemv":
            return
        facts = {"entry": self.entry, "key": str(key), "ratio": round(verdict.ratio, 2)}
        kernel = "native" if verdict.chosen else "torch"
        threads = torch.get_num_threads()
        logger.info("kernel chosen", extra={**facts, "kernel": kernel, "threads": threads})


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Of bf16 tensors; also of zeros' signs."""
    return (
        a.dtype == b.dtype == torch.bfloat16
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))
    )
