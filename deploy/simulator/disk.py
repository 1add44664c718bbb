"""A box's disk: one read after another, those first that something waits for."""

from __future__ import annotations

from proto.expert import ExpertKey


class Disk:
    """A read takes read_s and its bytes at bytes_per_s; what has begun is finished. It is asked in
    the order of time.

    takes_s: a read, when nothing else is read; busy_s, num_reads: so far
    """

    def __init__(self, bytes_per_s: float, read_s: float, expert_bytes: float) -> None:
        self.takes_s = read_s + expert_bytes / bytes_per_s
        self._free_s = self.busy_s = 0.0
        self.num_reads = 0
        self._ahead: dict[ExpertKey, float] = {}  # asked for when; not begun
        self._there_s: dict[ExpertKey, float] = {}  # read ahead, and not taken yet

    def read(self, now_s: float, key: ExpertKey) -> float:
        """When it is there. Something waits for it, so it goes before what is only read ahead."""
        self._catch_up(now_s)
        if (there_s := self._there_s.pop(key, None)) is not None:
            return max(now_s, there_s)
        self._ahead.pop(key, None)
        return self._start(now_s)

    def read_ahead(self, now_s: float, key: ExpertKey) -> None:
        """Begun when nothing else is to be read."""
        self._catch_up(now_s)
        self._ahead[key] = now_s

    def withdraw(self, now_s: float, key: ExpertKey) -> bool:
        """Whether it had not begun; then it never does."""
        self._catch_up(now_s)
        return self._ahead.pop(key, None) is not None

    def _catch_up(self, now_s: float) -> None:
        while self._ahead:
            key, asked_s = next(iter(self._ahead.items()))
            if max(self._free_s, asked_s) >= now_s:
                return
            del self._ahead[key]
            self._there_s[key] = self._start(asked_s)

    def _start(self, from_s: float) -> float:
        self._free_s = max(self._free_s, from_s) + self.takes_s
        self.busy_s += self.takes_s
        self.num_reads += 1
        return self._free_s
