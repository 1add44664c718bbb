"""The gRPC face of the gateway: how it is, for launcher and status."""

from __future__ import annotations

from typing import Any

import grpc.aio

from compute_node.gateway.stats import GatewayStats
from proto import gateway_pb2_grpc as pb_grpc
from proto import stats_pb2 as stats_pb

SERVICE_NAME = "flashmoe.v1.Gateway"


class GatewayService(pb_grpc.GatewayServicer):
    def __init__(self, stats: GatewayStats) -> None:
        self._stats = stats

    def register(self, server: grpc.aio.Server) -> None:
        pb_grpc.add_GatewayServicer_to_server(self, server)

    async def Stats(self, request: stats_pb.StatsRequest, context: Any) -> stats_pb.Snapshot:
        return self._stats.snapshot()
