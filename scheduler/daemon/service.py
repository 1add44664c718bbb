"""The gRPC face of the scheduler: translates, and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc.aio

from proto import scheduler_pb2 as pb
from proto import scheduler_pb2_grpc
from proto.expert import ExpertKey
from scheduler.daemon.scorer import Scorer
from scheduler.daemon.stats import SchedulerStats
from scheduler.shadow.shadows import Report, Score

NAME = "flashmoe.v1.Scheduler"


class SchedulerService(scheduler_pb2_grpc.SchedulerServicer):
    def __init__(
        self, scorer: Scorer, stats: Callable[[], SchedulerStats], horizon_steps: int
    ) -> None:
        self._scorer = scorer
        self._stats = stats
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

    async def Stats(
        self, request: pb.SchedulerStatsRequest, context: Any
    ) -> pb.SchedulerStatsReply:
        stats = self._stats()
        return pb.SchedulerStatsReply(
            events_seen=stats.events_seen,
            events_rejected=stats.events_rejected,
            labels_learned=stats.labels_learned,
            log_loss=stats.log_loss,
            baseline_log_loss=stats.baseline_log_loss,
            advice_published=stats.advice_published,
            advice_failed=stats.advice_failed,
            advice_age_s=stats.advice_age_s,
            step_ms=stats.step_ms,
            cpu_share=stats.cpu_share,
            drifts=stats.drifts,
            snapshots=stats.snapshots,
            redis_connected=stats.redis_connected,
            advice_version=stats.advice_version,
            shadow_steps_skipped=stats.shadow_steps_skipped,
            shadow_restarts=stats.shadow_restarts,
            learning_obstacle=stats.learning_obstacle,
            events_lost=stats.events_lost,
            steps_missed=stats.steps_missed,
            nodes=[_node_shadows(report) for report in stats.nodes],
        )


def _node_shadows(report: Report) -> pb.NodeShadows:
    reason = report.reason
    return pb.NodeShadows(
        node=report.node,
        slots=report.slots,
        scope=report.scope,
        steps=report.steps,
        in_charge=report.in_charge,
        reason=pb.Reason(
            kind=reason.kind,
            over=reason.over,
            lead_ratio=reason.lead_ratio,
            lead_steps=reason.lead_steps,
            at_step=reason.at_step,
        ),
        switches=report.switches,
        policies=[_policy_score(name, score) for name, score in report.policies.items()],
        actual=_policy_score("actual", report.actual),
    )


def _policy_score(policy: str, score: Score) -> pb.PolicyScore:
    return pb.PolicyScore(
        policy=policy,
        hit_ratio=score.hit_ratio,
        windowed_hit_ratio=score.windowed_hit_ratio,
        windowed_regret=score.windowed_regret,
    )
