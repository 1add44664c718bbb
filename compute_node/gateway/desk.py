"""What every route that generates works with."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from compute_node.gateway.bodies import Bodies
from compute_node.gateway.node import Node
from compute_node.gateway.stats import GatewayStats


@dataclass(frozen=True)
class Desk:
    node: Node
    bodies: Bodies
    stats: GatewayStats

    def client(self, request: Request) -> str:
        """Whose turn it is: the door knows."""
        name: str = request.state.client
        return name

    def note_gone(self) -> None:
        """A client left before the end of its stream."""
        self.stats.gone += 1
