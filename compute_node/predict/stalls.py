"""Divides what decode waited for experts by cause.

A wait ends when the store's answer is there, which says how long each expert in it was read and
verified. So the last part of a wait, as long as that, is the read's own: `too_late` if a guess of
the expert was open when its layer was reached, `not_foreseen` if not. What comes before is
`disk_busy`: the device was reading something else, a wrong guess or another expert, and the read
had not begun (a message's own way, some tenths of a millisecond, is in it). When nothing in the
answer was read for this node, the wait is the `message`'s. `no_decode` is every other wait: for
prompts, for the opening of a session, for what was given up. The five add up to the layer's
stall_s.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from compute_node.store.memory import Borrowed
from proto.expert import ExpertKey
from proto.stats import counter

_FAMILY, _TEXT = "flashmoe_node_stall_cause_seconds", "Compute waited for experts, by cause"
_KEY = "stall_cause_s"


@dataclass
class StallCauses:
    """Of one layer, in seconds since start."""

    not_foreseen: float = counter(_FAMILY, _TEXT, key=_KEY, start=0.0, cause="not_foreseen")
    too_late: float = counter(_FAMILY, _TEXT, key=_KEY, start=0.0, cause="too_late")
    disk_busy: float = counter(_FAMILY, _TEXT, key=_KEY, start=0.0, cause="disk_busy")
    message: float = counter(_FAMILY, _TEXT, key=_KEY, start=0.0, cause="message")
    no_decode: float = counter(_FAMILY, _TEXT, key=_KEY, start=0.0, cause="no_decode")


@dataclass
class Stalls:
    """One node's. One thread. by_layer: filled as layers wait"""

    by_layer: dict[int, StallCauses] = field(default_factory=dict)
    _layer: int | None = None
    _foreseen: Container[ExpertKey] = ()

    def enter(self, layer: int, foreseen: Container[ExpertKey]) -> None:
        """A decode step reaches `layer`. foreseen: its misses that a guess was open about"""
        self._layer, self._foreseen = layer, foreseen

    def leave(self) -> None:
        """A step that is no decode step begins."""
        self._layer = None

    def waited(self, layer: int, waited_s: float, arrived: Sequence[Borrowed]) -> None:
        """`layer` waited. arrived: what came then; empty: the wait was for nothing or given up"""
        causes = self.by_layer.get(layer)
        if causes is None:
            causes = self.by_layer[layer] = StallCauses()
        if layer != self._layer or not arrived:
            causes.no_decode += waited_s
            return
        read = [borrowed for borrowed in arrived if borrowed.bytes_read]
        if not read:
            causes.message += waited_s
            return
        own_s = min(waited_s, max(borrowed.read_s + borrowed.verify_s for borrowed in read))
        causes.disk_busy += waited_s - own_s
        if all(borrowed.key in self._foreseen for borrowed in read):
            causes.too_late += own_s
        else:
            causes.not_foreseen += own_s
