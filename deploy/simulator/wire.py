"""The main box's link to all other boxes."""

from __future__ import annotations

from deploy.simulator.geometry import Geometry
from deploy.simulator.setting import Link

_ACTIVATION_BYTES, _ID_BYTES, _FRAME_BYTES = 2, 8, 64


class Wire:
    """It sends one message after another, and receives one after another. num_bytes: so far"""

    def __init__(self, link: Link, geometry: Geometry) -> None:
        self._link = link
        self._row_bytes = geometry.hidden_size * _ACTIVATION_BYTES
        self._sent_bytes = self._row_bytes + geometry.top_k * _ID_BYTES + _FRAME_BYTES
        self._sent_s = self._received_s = 0.0
        self.num_bytes = 0

    @property
    def way_s(self) -> float:
        """Of work of one expert and its answer, when nothing else is sent."""
        sizes = self._sent_bytes, self._answer_bytes(1)
        return 2 * self._half_s + sum(map(self._alone_s, sizes))

    def named(self, now_s: float) -> float:
        """When names have come to another box; they take no room."""
        return now_s + self._link.round_trip_s / 2

    def work(self, now_s: float) -> float:
        """When work has come to another box."""
        self._sent_s = max(self._sent_s, now_s) + self._takes_s(self._sent_bytes)
        return self._sent_s + self._half_s

    def answer(self, now_s: float, num_experts: int) -> float:
        """When rows have come back; asked in the order in which they are sent."""
        takes_s = self._takes_s(self._answer_bytes(num_experts))
        self._received_s = max(self._received_s, now_s + self._half_s) + takes_s
        return self._received_s

    @property
    def _half_s(self) -> float:
        return (self._link.round_trip_s + self._link.message_s) / 2

    def _takes_s(self, size: int) -> float:
        self.num_bytes += size
        return self._alone_s(size)

    def _alone_s(self, size: int) -> float:
        return size * 8 / self._link.bits_per_s + self._link.serial_s / 2

    def _answer_bytes(self, num_experts: int) -> int:
        return num_experts * self._row_bytes + _FRAME_BYTES
