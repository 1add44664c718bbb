"""What the gateway counts of its requests."""

from __future__ import annotations

from dataclasses import dataclass, field

from proto import stats
from proto import stats_pb2 as pb
from proto.stats import counter, fact, gauge, labelled


@dataclass
class Answers:
    """Requests that ended with one HTTP status."""

    num: int = counter("flashmoe_gateway_requests", "Requests by HTTP status", key="answered")


@dataclass
class GatewayStats:
    """by_status: of requests that have ended"""

    by_status: dict[int, Answers] = field(default_factory=dict)
    under_way: int = gauge("flashmoe_gateway_requests_under_way", "Requests under way", start=0)
    url: str = fact("where it serves", start="")
    gone: int = counter("flashmoe_gateway_gone", "Requests whose client left before the end")

    def count(self, status: int) -> None:
        self.by_status.setdefault(status, Answers()).num += 1

    def snapshot(self) -> pb.Snapshot:
        answers = sorted(self.by_status.items())
        return stats.snapshot(self, *(labelled(one, status=status) for status, one in answers))
