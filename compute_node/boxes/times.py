"""What an expert costs on a box, as measured."""

from __future__ import annotations

from proto import worker_pb2 as pb

_SMOOTHING = 0.1


class Times:
    """Seconds, running means; 0: not known. One thread changes them.

    way_s:    a message to the box and back, at least, without what happens there; inf: not known
    expert_s: computing one that is in memory, for a decode step
    read_s:   reading one
    """

    def __init__(self) -> None:
        self.way_s = float("inf")
        self.expert_s = self.read_s = 0.0

    def way(self, took_s: float) -> None:
        """A message there and back took so long."""
        self.way_s = min(self.way_s, took_s)

    def computed(self, took_s: float, num_experts: int) -> None:
        """A step computed these, all in memory."""
        share = _SMOOTHING if self.expert_s else 1.0
        self.expert_s += share * (took_s / num_experts - self.expert_s)

    def heard(self, reply: pb.WorkReply, num_experts: int) -> None:
        """Of work of as many experts, for a decode step."""
        if not reply.num_read:
            self.computed(1e-6 * reply.took_us, num_experts)
        self.read_s = 1e-6 * reply.read_us
