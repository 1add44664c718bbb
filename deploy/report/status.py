"""Asks every daemon of a stack how it is."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.stack.run_dir import RunDir
from proto import errors, rpc
from proto import stats_pb2 as pb
from proto.compute_node_pb2_grpc import ComputeNodeStub
from proto.expert_store_pb2_grpc import ExpertStoreStub
from proto.gateway_pb2_grpc import GatewayStub
from proto.memory_report import MemoryReport
from proto.scheduler_pb2_grpc import SchedulerStub
from proto.shadow_pb2_grpc import ShadowStub
from proto.stats import Stats
from proto.worker_pb2_grpc import WorkerStub

_TIMEOUT_S = 3.0

Facts = dict[str, Any]


def check_health(address: str, tls: rpc.TlsFiles | None = None) -> str:
    """SERVING, NOT_SERVING, or away."""
    with rpc.connect(address, tls) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError:
            return "away"
    return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


def collect_status(run: RunDir) -> dict[str, Facts]:
    """Facts by daemon; one that does not answer has health `away` and nothing else."""
    asked = [name for name in _DAEMONS if name not in _NOT_ALWAYS or run.socket(name).exists()]
    if helps := [name for name in ("worker", "shadow") if name in asked]:
        asked = [*([] if _borrows(run) else ["expert_store"]), *helps]
    found = {name: _ask(run, name) for name in asked}
    report = MemoryReport.read(run.path)
    if report is not None:
        found["memory"] = {
            "ceiling_bytes": report.ceiling_bytes,
            "peak_bytes": report.peak_bytes,
            "current_bytes": report.current_bytes,
            "age_s": round(report.age_s, 1),
        }
    return found


def _borrows(run: RunDir) -> bool:
    """Whether the experts of this box come from another box's store."""
    try:
        return "expert_store" not in tomllib.loads(run.config.read_text())
    except (OSError, tomllib.TOMLDecodeError):  # of no launcher of ours
        return False


def _ask(run: RunDir, name: str) -> Facts:
    facts: Facts = {"health": check_health(run.address(name))}
    if facts["health"] == "away":
        return facts
    try:
        facts |= _facts(run.address(name), *_DAEMONS[name])
    except grpc.RpcError:
        facts["health"] = "away"
    except errors.VersionMismatch as error:
        facts["problem"] = str(error)
    port_file = run.path / f"{name}.metrics"
    if port_file.exists():
        facts["metrics"] = f"http://127.0.0.1:{port_file.read_text().strip()}/metrics"
    return facts


def _facts(address: str, stub: type[Any], choose: Callable[[Stats], Facts]) -> Facts:
    """The figures that people look for first, then all that the daemon shows."""
    with rpc.connect(address) as channel:
        stats = Stats.from_pb(stub(channel).Stats(pb.StatsRequest(), timeout=_TIMEOUT_S))
    return {**choose(stats), "stats": stats.document()}


_COUNTED_BY_STORE = (
    "demand_reads",
    "bytes_read",
    "shared_hits",
    "prefetch_reads",
    "prefetches_used",
    "prefetches_withdrawn",
    "prefetch_bytes_wasted",
    "prefetch_bytes_read",
    "prefetch_bytes_used",
)
_HELD_BY_STORE = (
    "slots_leased",
    "slots_free",
    "slots_filling",
    "slots_reclaimable",
    "sessions",
    "orphaned_sessions",
    "quarantined",
)


def _store_facts(stats: Stats) -> Facts:
    return {
        **_pick(stats, _COUNTED_BY_STORE),
        "device_bytes_per_s": round(stats.bytes_read / stats.busy_s) if stats.busy_s else None,
        "disk_busy_share": round(stats.busy_share, 4),
        **_pick(stats, _HELD_BY_STORE),
    }


_OF_A_SHADOW = ("up", "named", "named_late", "unnamed", "unheard", "recall", "bytes_sent")
_OF_A_BOX = ("up", "answered", "late", "failed", "bytes_sent", "bytes_received")
_HELD = ("experts_held", "experts_total", "slots")


def _node_facts(stats: Stats) -> Facts:
    """Without Redis nothing is known of advice and evidence."""
    total = stats.hits + stats.misses
    found = [d.get("prefetch_precision") for d in stats.by("layers_ahead").values()]
    return {
        **_pick(stats, ("weights", "policy")),
        "hit_ratio": round(stats.hits / total, 4) if total else None,
        **_pick(stats, ("resident", "slots", "requests", "live", "queued", "turn")),
        **_pick(stats, ("kept_prompts", "kept_hits", "tokens_saved", "kept_tokens")),
        **_pick(stats, ("kept_bytes", "reserved_bytes", "state_bytes")),
        "advice_age_s": _rounded(stats.advice_age_s, 3),
        "advice_version": stats.advice_version,
        **_pick(stats, ("advice_used", "advice_fallbacks")),
        "evidence_sent": stats.evidence_sent,
        "evidence_dropped": stats.evidence_dropped,
        "learning": _learning(stats),
        **_pick(stats, ("store_reconnects", "prefetch_depth")),
        "prefetch_precision": [round(one, 3) for one in found if one is not None],
        "prefetch_recall": _recall(stats),
        **_pick(stats, ("layers_without_stream", "layers_without_router")),
        "foresight": _foresight(stats),
        **_pick(stats, ("run_ahead", "run_ahead_s", "run_ahead_starts")),
        **_pick(stats, ("exact_pass", "lossy_tokens")),
        "quality": _quality(stats),
        "stall_s": {cause: round(s.stall_cause_s, 3) for cause, s in stats.by("cause").items()},
        "boxes": {box: _pick(one, _OF_A_BOX + _HELD) for box, one in stats.by("box").items()},
        "shadow_nodes": {at: _pick(one, _OF_A_SHADOW) for at, one in stats.by("shadow").items()},
    }


def _quality(stats: Stats) -> list[Facts]:
    """A line for each budget that was asked for: what decodes within it now, and what checks found
    of that.
    """
    return [
        {
            "budget": budget,
            "route": guard.quality_route,
            **{name: _rounded(guard.get(f"quality_{name}"), 5) for name in _GUARDED},
            **{name: guard.get(f"quality_{name}") for name in ("checks", "tightened", "relaxed")},
        }
        for budget, guard in stats.by("budget").items()
    ]


_GUARDED = ("kl", "kl_low", "kl_high", "kl_limit", "top1")


def _recall(stats: Stats) -> float | None:
    """Share of decode's misses that had been guessed."""
    missed = stats.decode_misses
    return round(stats.foreseen_misses / missed, 3) if missed else None


def _foresight(stats: Stats) -> list[Facts]:
    """A line for each predictor and distance. recall: share of decode's misses that it was the
    first to guess; precision: share of its guesses that were misses
    """
    return [
        {
            "predictor": predictor,
            "layers_ahead": int(number),
            "recall": _rounded(worth.foresight_recall, 3),
            "precision": _rounded(worth.foresight_precision, 3),
        }
        for predictor, of_one in stats.by("predictor").items()
        for number, worth in of_one.by("layers_ahead").items()
    ]


_COUNTED_BY_SCHEDULER = (
    "events_seen",
    "events_rejected",
    "events_lost",
    "steps_missed",
    "labels_learned",
)


def _scheduler_facts(stats: Stats) -> Facts:
    return {
        "redis_connected": stats.redis_connected,
        "learning": _learning(stats),
        **_pick(stats, _COUNTED_BY_SCHEDULER),
        "log_loss": round(stats.log_loss, 4),
        "baseline_log_loss": round(stats.baseline_log_loss, 4),
        "advice_published": stats.advice_published,
        "advice_age_s": _rounded(stats.advice_age_s, 3),
        "step_ms": round(1000 * stats.step_s, 3),
        "cpu_share": round(stats.cpu_share, 4),
        "nodes": {node: _shadow_facts(shadows) for node, shadows in stats.by("node").items()},
    }


_SCORES = ("hit_ratio", "windowed_hit_ratio", "windowed_regret")


def _shadow_facts(shadows: Stats) -> Facts:
    """Who is in charge of a node, and every policy's hit ratio under its budget."""
    scores = {
        policy: {name: round(getattr(score, name), 4) for name in _SCORES}
        for policy, score in shadows.by("policy").items()
        if score.get("hit_ratio") is not None
    }
    return {
        **_pick(shadows, ("in_charge", "why", "switches", "steps", "slots", "scope")),
        "policies": scores,
    }


def _gateway_facts(stats: Stats) -> Facts:
    answered = {status: one.answered for status, one in stats.by("status").items()}
    return {**_pick(stats, ("url", "under_way", "gone")), "answered": answered}


def _worker_facts(stats: Stats) -> Facts:
    total = stats.hits + stats.misses
    return {
        "hit_ratio": round(stats.hits / total, 4) if total else None,
        **_pick(stats, ("resident", "answered", "experts_computed")),
        **_pick(stats, (*_HELD, "share", "store_reconnects")),
    }


def _shadow_node_facts(stats: Stats) -> Facts:
    return _pick(stats, ("resident", "followed", "guessed", "guessed_right", "states"))


def _pick(stats: Stats, keys: Iterable[str]) -> Facts:
    return {key: getattr(stats, key) for key in keys}


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _learning(stats: Stats) -> str:
    return f"off: {stats.learning_obstacle}" if stats.learning_obstacle else "on"


_DAEMONS: dict[str, tuple[type[Any], Callable[[Stats], Facts]]] = {
    "expert_store": (ExpertStoreStub, _store_facts),
    "compute_node": (ComputeNodeStub, _node_facts),
    "scheduler": (SchedulerStub, _scheduler_facts),
    "gateway": (GatewayStub, _gateway_facts),
    "worker": (WorkerStub, _worker_facts),
    "shadow": (ShadowStub, _shadow_node_facts),
}
_NOT_ALWAYS = ("gateway", "worker", "shadow")
