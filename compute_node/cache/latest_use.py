"""What answers used last, for prompts to spare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

from proto.expert import ExpertKey


class LatestUse:
    """Experts in the order of their latest use; none while no answer is under way."""

    def __init__(self) -> None:
        self._keys: dict[ExpertKey, None] = {}  # the latest last
        self._num_answers = 0

    @contextmanager
    def answering(self) -> Iterator[None]:
        """An answer is under way, for the block."""
        self._num_answers += 1
        try:
            yield
        finally:
            self._num_answers -= 1
            if not self._num_answers:
                self._keys.clear()

    def note(self, keys: Iterable[ExpertKey]) -> None:
        if not self._num_answers:
            return
        for key in keys:
            self._keys.pop(key, None)
            self._keys[key] = None

    def latest(self, most: int, layer: int | None = None) -> frozenset[ExpertKey]:
        """At most `most` of them, the latest. layer: None: of all layers"""
        keys = (key for key in reversed(self._keys) if layer is None or key.layer == layer)
        return frozenset(islice(keys, most))
