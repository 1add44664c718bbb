"""The gRPC face of the scheduler: translates, and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc.aio

from proto import scheduler_pb2 as pb
from proto import scheduler_pb2_grpc
from proto import stats_pb2 as stats_pb
from proto.expert import ExpertKey
from scheduler.daemon.scorer import Scorer

NAME = "flashmoe.v1.Scheduler"


class SchedulerService(scheduler_pb2_grpc.SchedulerServicer):
    def __init__(
        self, scorer: Scorer, snapshot: Callable[[], stats_pb.Snapshot], horizon_steps: int
    ) -> None:
        self._scorer = scorer
        self._snapshot = snapshot
        self._horizon_steps = horizon_steps

    def register(self, server: grpc.aio.Server) -> None:
        scheduler_pb2_grpc.add_SchedulerServicer_to_server(self, server)

    async def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainReply:
        explanation = self._scorer.explain(ExpertKey.from_pb(request.key))
        return pb.ExplainReply(
            key=request.key,
            score=explanation.score,
            horizon_steps=self._horizon_steps,
            bias=explanation.bias,
            features=[
                pb.FeatureContribution(
                    name=term.name,
                    value=term.value,
                    weight=term.weight,
                    contribution=term.contribution,
                )
                for term in explanation.contributions
            ],
        )

    async def Stats(self, request: stats_pb.StatsRequest, context: Any) -> stats_pb.Snapshot:
        return self._snapshot()
