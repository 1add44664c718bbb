"""An answer that is text and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from compute_node.gateway.formats.said import Said, Text


class Plain:
    def feed(self, text: str) -> Sequence[Said]:
        return [Text(text)] if text else []

    def end(self) -> Sequence[Said]:
        return []
