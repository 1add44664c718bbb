"""Memory for the state of sequences: of those that are alive, and of prompts that are kept."""

from __future__ import annotations

from dataclasses import dataclass, field

from compute_node.engine.kept import KeptPrompts
from proto.stats import gauge

_STATE, _HELP = "flashmoe_node_state_bytes", "Memory for the state of sequences"


@dataclass
class KvRoom:
    """What is alive goes before what is kept. One thread.

    most_bytes:      of all state together; 0: nobody planned for more than one sequence, so no
                     other is alive beside it and nothing is kept
    bytes_per_token: of a sequence's state
    bytes_fixed:     of a sequence's state, however long it is
    most_sequences:  alive at once
    reserved_bytes:  that sequences which are alive may come to
    """

    most_bytes: int = gauge(_STATE, _HELP, key="state_bytes", start=0, of="limit")
    bytes_per_token: int = 0
    bytes_fixed: int = 0
    most_sequences: int = 8
    kept: KeptPrompts = field(default_factory=KeptPrompts)
    reserved_bytes: int = gauge(_STATE, _HELP, key="reserved_bytes", start=0, of="reserved")
    _num_alive: int = 0

    def reserve(self, num_tokens: int) -> bool:
        """See `Room`. What is kept goes where it has to."""
        if num_tokens == 0:
            return True
        if not self._fits(self._bytes_of(num_tokens)):
            return False
        self.reserved_bytes += self._bytes_of(num_tokens)
        self._num_alive += 1
        self.shrink()
        return True

    def free(self, num_tokens: int) -> None:
        if num_tokens:
            self.reserved_bytes -= self._bytes_of(num_tokens)
            self._num_alive -= 1

    @property
    def keeps_prompts(self) -> bool:
        return self.most_bytes > 0

    def shrink(self) -> None:
        """What is kept goes as far as it does not fit."""
        while self.kept.num_bytes > max(0, self.most_bytes - self.reserved_bytes):
            self.kept.give_up_one()

    def _fits(self, num_bytes: int) -> bool:
        if self.most_bytes == 0:
            return self._num_alive == 0
        left = self.most_bytes - self.reserved_bytes
        return self._num_alive < self.most_sequences and num_bytes <= left

    def _bytes_of(self, num_tokens: int) -> int:
        return self.bytes_fixed + num_tokens * self.bytes_per_token
