"""Asks every daemon of a stack how it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.stack.memory import MemoryReport
from deploy.stack.run_dir import RunDir
from proto import compute_node_pb2, expert_store_pb2, rpc, scheduler_pb2
from proto.compute_node_pb2_grpc import ComputeNodeStub
from proto.expert_store_pb2_grpc import ExpertStoreStub
from proto.scheduler_pb2_grpc import SchedulerStub
from proto.weight_format import WeightFormat

_TIMEOUT_S = 3.0


def check_health(address: str, tls: rpc.TlsFiles | None = None) -> str:
    """SERVING, NOT_SERVING, or away."""
    with rpc.connect(address, tls) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError:
            return "away"
    return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


def collect_status(run: RunDir) -> dict[str, dict[str, Any]]:
    """Facts by daemon; one that does not answer has health `away` and nothing else."""
    asks: dict[str, Callable[[grpc.Channel], dict[str, Any]]] = {
        "expert_store": _store_facts,
        "compute_node": _node_facts,
        "scheduler": _scheduler_facts,
    }
    found = {name: _ask(run, name, ask) for name, ask in asks.items()}
    report = MemoryReport.read(run.path)
    if report is not None:
        found["memory"] = {
            "ceiling_bytes": report.ceiling_bytes,
            "peak_bytes": report.peak_bytes,
            "current_bytes": report.current_bytes,
            "age_s": round(report.age_s, 1),
        }
    return found


def _ask(run: RunDir, name: str, ask: Callable[[grpc.Channel], dict[str, Any]]) -> dict[str, Any]:
    facts: dict[str, Any] = {"health": check_health(run.address(name))}
    if facts["health"] == "away":
        return facts
    with rpc.connect(run.address(name)) as channel:
        try:
            facts |= ask(channel)
        except grpc.RpcError:
            facts["health"] = "away"
    port_file = run.path / f"{name}.metrics"
    if port_file.exists():
        facts["metrics"] = f"http://127.0.0.1:{port_file.read_text().strip()}/metrics"
    return facts


def _store_facts(channel: grpc.Channel) -> dict[str, Any]:
    stats = ExpertStoreStub(channel).Stats(expert_store_pb2.StoreStatsRequest(), timeout=_TIMEOUT_S)
    return {
        "demand_reads": stats.demand_reads,
        "bytes_read": stats.bytes_read,
        "shared_hits": stats.shared_hits,
        "prefetch_reads": stats.prefetch_reads,
        "prefetches_used": stats.prefetches_used,
        "prefetches_withdrawn": stats.prefetches_withdrawn,
        "prefetch_bytes_wasted": stats.prefetch_bytes_wasted,
        "device_bytes_per_s": _rate(stats.bytes_read, stats.busy_s_total),
        "slots_leased": stats.slots_leased,
        "slots_free": stats.slots_free,
        "slots_filling": stats.slots_filling,
        "slots_reclaimable": stats.slots_reclaimable,
        "sessions": stats.sessions,
        "orphaned_sessions": stats.orphaned_sessions,
        "quarantined": list(stats.quarantined),
    }


def _node_facts(channel: grpc.Channel) -> dict[str, Any]:
    stats = ComputeNodeStub(channel).Stats(compute_node_pb2.NodeStatsRequest(), timeout=_TIMEOUT_S)
    total = stats.hits + stats.misses
    return {
        "weights": str(WeightFormat.from_pb(stats.weight_format)),
        "policy": stats.policy,
        "hit_ratio": round(stats.hits / total, 4) if total else None,
        "resident": stats.resident,
        "slots": stats.slots,
        "requests": stats.requests,
        "queued": stats.queued,
        "advice_age_s": round(stats.advice_age_s, 3) if stats.HasField("advice_age_s") else None,
        "advice_version": stats.advice_version,
        "advice_used": stats.advice_used,
        "advice_fallbacks": stats.advice_fallbacks,
        "evidence_sent": stats.evidence_sent,
        "evidence_dropped": stats.evidence_dropped,
        "learning": _learning(stats.learning_obstacle),
        "store_reconnects": stats.store_reconnects,
        "prefetch_depth": stats.prefetch_depth,
        "prefetch_precision": [round(p.precision, 3) for p in stats.prefetches],
        "prefetch_recall": _recall(stats),
    }


def _learning(obstacle: str) -> str:
    return f"off: {obstacle}" if obstacle else "on"


def _rate(count: int, seconds: float) -> float | None:
    return round(count / seconds) if seconds else None


def _recall(stats: compute_node_pb2.NodeStatsReply) -> float | None:
    """Share of decode's misses that had been guessed."""
    right = sum(p.right for p in stats.prefetches)
    missed = right + stats.unguessed_misses
    return round(right / missed, 3) if missed else None


def _scheduler_facts(channel: grpc.Channel) -> dict[str, Any]:
    stats = SchedulerStub(channel).Stats(scheduler_pb2.SchedulerStatsRequest(), timeout=_TIMEOUT_S)
    return {
        "redis_connected": stats.redis_connected,
        "learning": _learning(stats.learning_obstacle),
        "events_seen": stats.events_seen,
        "events_rejected": stats.events_rejected,
        "events_lost": stats.events_lost,
        "steps_missed": stats.steps_missed,
        "labels_learned": stats.labels_learned,
        "log_loss": round(stats.log_loss, 4),
        "baseline_log_loss": round(stats.baseline_log_loss, 4),
        "advice_published": stats.advice_published,
        "advice_age_s": round(stats.advice_age_s, 3) if stats.HasField("advice_age_s") else None,
        "step_ms": round(stats.step_ms, 3),
        "cpu_share": round(stats.cpu_share, 4),
        "nodes": {shadows.node: _shadow_facts(shadows) for shadows in stats.nodes},
    }


def _shadow_facts(shadows: scheduler_pb2.NodeShadows) -> dict[str, Any]:
    """Who is in charge of a node, and every policy's hit ratio under its budget."""
    return {
        "in_charge": shadows.in_charge,
        "why": _why(shadows.reason),
        "switches": shadows.switches,
        "steps": shadows.steps,
        "slots": shadows.slots,
        "scope": shadows.scope,
        "policies": {
            score.policy: {
                "hit_ratio": round(score.hit_ratio, 4),
                "windowed_hit_ratio": round(score.windowed_hit_ratio, 4),
                "windowed_regret": round(score.windowed_regret, 4),
            }
            for score in (*shadows.policies, shadows.actual)
        },
    }


def _why(reason: scheduler_pb2.Reason) -> str:
    if reason.kind in ("led", "steady"):
        when = "of late" if reason.kind == "led" else "over the long run"
        points = f"{100 * reason.lead_ratio:.2f} points in {reason.lead_steps} steps"
        return f"led {reason.over} {when}, by {points}, at step {reason.at_step}"
    return {"first": "no other has led it yet", "pinned": "configured"}.get(
        reason.kind, reason.kind
    )
