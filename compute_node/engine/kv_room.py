"""Memory for the state of sequences: of those that are alive, and of prompts that are kept."""

from __future__ import annotations

from dataclasses import dataclass

from compute_node.engine.kept import KeptPrompts
from proto.stats import fact


@dataclass
class KvRoom:
    """Counts tokens, all of which take the same memory. What is alive goes before what is kept. One
    thread.

    most_tokens:    of all sequences together
    most_sequences: alive at once
    """

    kept: KeptPrompts
    most_tokens: int = fact("that all sequences' state has room for", key="kv_tokens")
    most_sequences: int = fact("alive at once", key="most_sequences")
    reserved_tokens: int = fact("that live sequences may come to", key="kv_reserved", start=0)
    _num_alive: int = 0

    def reserve(self, num_tokens: int) -> bool:
        """See `Room`. What was kept goes where it has to."""
        if num_tokens == 0:
            return True
        left = self.most_tokens - self.reserved_tokens
        if num_tokens > left or self._num_alive >= self.most_sequences:
            return False
        self.reserved_tokens += num_tokens
        self._num_alive += 1
        self.shrink()
        return True

    def free(self, num_tokens: int) -> None:
        if num_tokens:
            self.reserved_tokens -= num_tokens
            self._num_alive -= 1

    def shrink(self) -> None:
        """What is kept goes as far as it does not fit."""
        while self.kept.num_tokens > self.most_tokens - self.reserved_tokens:
            if not self.kept.give_up_one():
                return
