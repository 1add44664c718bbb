"""What a person reads of a stack's state: the facts of `deploy/report/status.py` in words and
units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from compute_node.live.words import STALL_CAUSES, called
from deploy.terminal import console

_HEALTH = {"SERVING": "serving", "NOT_SERVING": "not serving: it is starting or stopping"}
Facts = Mapping[str, Any]
_OLD_S = 5.0  # of a memory report, which is written twice a second


def status_rows(
    found: Mapping[str, Facts], absences: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """A table a daemon: title -> rows.

    absences: why each daemon that is away does not answer
    """
    pages: dict[str, dict[str, str]] = {}
    for name, show in _DAEMONS.items():
        if name not in found:
            continue
        facts = found[name]
        rows = {"health": _health(facts, absences.get(name, ""))}
        if facts.keys() - {"health", "metrics", "problem"}:
            rows |= show(facts)
        if "problem" in facts:
            rows["problem"] = facts["problem"]
        if "metrics" in facts:
            rows["metrics"] = facts["metrics"]
        pages[name.replace("_", " ")] = rows
    if "memory" in found:
        pages["memory"] = _memory_rows(found["memory"])
    for node, shadows in found.get("scheduler", {}).get("nodes", {}).items():
        pages[f"policies of {node}"] = shadow_rows(shadows)
    return pages


def _health(facts: Facts, absence: str) -> str:
    health: str = facts["health"]
    return f"away: {absence}" if health == "away" else _HEALTH.get(health, health)


def _used_share(used_bytes: int, read_bytes: int) -> str:
    """Empty while nothing was read ahead."""
    return f"; {used_bytes / read_bytes:.0%} of its bytes used" if read_bytes else ""


def _store_rows(facts: Facts) -> dict[str, str]:
    rate = facts["device_bytes_per_s"]
    damaged = facts["quarantined"]
    sessions = count(facts["sessions"], "node")
    if facts["orphaned_sessions"]:
        sessions += f", {facts['orphaned_sessions']:,} more whose connection broke"
    return {
        "read": f"{console.size(facts['bytes_read'])}"
        + (f" at {console.size(rate)}/s" if rate else "")
        + f"; {count(facts['demand_reads'], 'expert')} on demand, "
        f"{facts['prefetch_reads']:,} ahead",
        "read ahead": f"{facts['prefetches_used']:,} used, {facts['prefetches_withdrawn']:,} "
        f"withdrawn, {console.size(facts['prefetch_bytes_wasted'])} read for nothing"
        + _used_share(facts["prefetch_bytes_used"], facts["prefetch_bytes_read"]),
        "disk": f"busy {facts['disk_busy_share']:.1%} of the time since the store started",
        "from memory": f"{count(facts['shared_hits'], 'expert')} lent without a read",
        "slots": f"{facts['slots_leased']:,} lent, {facts['slots_filling']:,} being filled, "
        f"{facts['slots_reclaimable']:,} kept and not lent, {facts['slots_free']:,} free",
        "lends to": sessions,
        "damaged": f"{', '.join(damaged)}: `flashmoe verify` names the files"
        if damaged
        else "nothing found",
    }


def _node_rows(facts: Facts) -> dict[str, str]:
    return {
        "weights": facts["weights"],
        "hit ratio": "nothing was computed yet"
        if facts["hit_ratio"] is None
        else f"{facts['hit_ratio']:.1%} of the experts used were in memory",
        "experts": f"{facts['resident']:,} in memory, room for {facts['slots']:,}",
        "requests": f"{facts['requests']:,} since the start, {facts['live']:,} taking turns of "
        f"{count(facts['turn'], 'token')}, {facts['queued']:,} waiting",
        "kept prompts": _kept(facts),
        "gives up by": f"policy {facts['policy']}",
        "learning": facts["learning"],
        "advice": _advice(facts),
        "evidence": f"{count(facts['evidence_sent'], 'step')} sent to the scheduler, "
        f"{facts['evidence_dropped']:,} dropped",
        "guesses": _guesses(facts) + _unknown_layers(facts),
        "run-ahead": _run_ahead(facts),
        "waited": _stalls(facts["stall_s"]),
        "store": _lost(facts["store_reconnects"]),
        **{
            f"shadow {address}": _shadow(shadow)
            for address, shadow in facts.get("shadow_nodes", {}).items()
        },
        **{f"box {address}": _box(box) for address, box in facts.get("boxes", {}).items()},
    }


def _box(box: Facts) -> str:
    """Of a worker that computes experts for the node."""
    return (
        f"{'is given work' if box['up'] else 'away'}; {box['answered']:,} answered, "
        f"{box['late']:,} late, {box['failed']:,} failed; {console.size(box['bytes_sent'])} sent, "
        f"{console.size(box['bytes_received'])} received"
        + ("" if box["experts_held"] is None else f"; {_held(box)}, room for {box['slots']:,}")
    )


def _held(facts: Facts) -> str:
    """Which of the model's experts a box's store has."""
    if facts["experts_held"] == facts["experts_total"]:
        return f"has all {facts['experts_total']:,} experts"
    return f"has {facts['experts_held']:,} of {facts['experts_total']:,} experts"


def _shadow(shadow: Facts) -> str:
    """Of a node that names experts for the node."""
    in_time = shadow["named"] / max(1, shadow["named"] + shadow["unheard"])
    return (
        f"{'follows' if shadow['up'] else 'away'}; named {shadow['recall']:.1%} of the experts "
        f"used, {in_time:.0%} of them in time; {console.size(shadow['bytes_sent'])} sent"
    )


def _kept(facts: Facts) -> str:
    if facts["kept_prompts"] != "on":
        return str(facts["kept_prompts"])
    return (
        f"{count(facts['kept_hits'], 'prompt')} began like one before, "
        f"{count(facts['tokens_saved'], 'token')} not computed again; "
        f"{console.size(facts['kept_bytes'])} kept and {console.size(facts['reserved_bytes'])} "
        f"reserved of {console.size(facts['state_bytes'])}"
    )


def _advice(facts: Facts) -> str:
    age_s = facts["advice_age_s"]
    decided = (
        f"it decided {facts['advice_used']:,} evictions, the node alone "
        f"{facts['advice_fallbacks']:,}"
    )
    return f"none came yet; {decided}" if age_s is None else f"{age_s:.1f} s old; {decided}"


def _guesses(facts: Facts) -> str:
    """How well the next layers' routers, asked early, name the experts that will be missed."""
    depth, recall = facts["prefetch_depth"], facts["prefetch_recall"]
    if not depth:
        return "none are sent: they do not pay now"
    right = [f"{precision:.0%}" for precision in facts["prefetch_precision"][:depth]]
    text = f"{', '.join(right)} right, by layers ahead" if right else f"up to {depth} layers ahead"
    if recall is None:
        return text
    return f"{text}; {recall:.0%} of what was missing was guessed{_by_predictor(facts)}"


def _unknown_layers(facts: Facts) -> str:
    """What was not recognised in this model."""
    text = ""
    if layers := facts["layers_without_stream"]:
        text += f"; less surely of layers {', '.join(layers)}: no residual stream was recognised"
    if layers := facts["layers_without_router"]:
        text += f"; none of layers {', '.join(layers)}: their routers cannot be asked early"
    return text


_PREDICTORS = {
    "next_router": "by the next routers",
    "map": "by the map of the routers",
    "run_ahead": "by running ahead",
}


def _by_predictor(facts: Facts) -> str:
    """` (by the next routers 31%, by running ahead 45%)`: who was the first."""
    shares: dict[str, float] = {}
    for worth in facts["foresight"]:
        shares[worth["predictor"]] = shares.get(worth["predictor"], 0.0) + (worth["recall"] or 0.0)
    parts = [f"{_PREDICTORS.get(name, name)} {share:.0%}" for name, share in shares.items()]
    return f" ({', '.join(parts)})" if parts else ""


def _run_ahead(facts: Facts) -> str:
    if facts["run_ahead"] != "on":
        return str(facts["run_ahead"])
    used_s, starts = facts["run_ahead_s"], facts["run_ahead_starts"]
    return f"on; it used {used_s:,.1f} s of waits, starting {times(starts)}"


def _stalls(stall_s: Mapping[str, float]) -> str:
    """What compute waited for experts, by cause, the most first."""
    causes = sorted(stall_s.items(), key=lambda one: -one[1])
    parts = [f"{waited_s:,.1f} s {called(STALL_CAUSES, name)}" for name, waited_s in causes]
    return ", ".join(parts) or "not yet"


def _scheduler_rows(facts: Facts) -> dict[str, str]:
    age_s = facts["advice_age_s"]
    published = f"{facts['advice_published']:,} published"
    lost = {
        "refused": facts["events_rejected"],
        "lost": facts["events_lost"],
        "missed": facts["steps_missed"],
    }
    return {
        "Redis": "connected" if facts["redis_connected"] else "not reached: nothing is learned",
        "learning": facts["learning"],
        "evidence": f"{count(facts['events_seen'], 'step')} seen"
        + "".join(f", {number:,} {what}" for what, number in lost.items() if number),
        "advice": published if age_s is None else f"{published}, the latest {age_s:.1f} s ago",
        "learned": _learned(facts),
        "takes": f"{facts['step_ms']:.1f} ms a step, {facts['cpu_share']:.1%} of a core",
    }


def _learned(facts: Facts) -> str:
    if not facts["labels_learned"]:
        return "nothing yet"
    return (
        f"from {facts['labels_learned']:,} outcomes; loss {facts['log_loss']:.3f}, "
        f"always guessing the mean {facts['baseline_log_loss']:.3f}"
    )


def _memory_rows(facts: Facts) -> dict[str, str]:
    now = f"{console.size(facts['current_bytes'])} of {console.size(facts['ceiling_bytes'])}"
    if facts["age_s"] > _OLD_S:
        now += f", {facts['age_s']:,.0f} s ago: the launcher could not write it since"
    return {
        "now": now,
        "at most": console.size(facts["peak_bytes"]),
    }


def shadow_rows(shadows: Facts) -> dict[str, str]:
    """Who is in charge and why, then a line a policy, the best of the last steps first."""
    scope = "in one pool" if shadows["scope"] == "pool" else "divided by layer"
    rows = {
        "in charge": f"{shadows['in_charge']}: {shadows['why']}, "
        f"{times(shadows['switches'])} changed",
        "budget": f"{shadows['slots']:,} slots {scope}, {count(shadows['steps'], 'step')} followed",
    }
    scores = shadows["policies"]
    for name in sorted(scores, key=lambda name: -scores[name]["windowed_hit_ratio"]):
        rows[_POLICIES.get(name, name)] = _score(name, scores[name])
    return rows


_POLICIES = {"actual": "this node", "min": "min, the optimum"}


def _score(name: str, score: Facts) -> str:
    short = 100 * score["windowed_regret"]
    hits = f"{score['windowed_hit_ratio']:.2%} hits lately, {score['hit_ratio']:.2%} in all"
    if name == "min" or short < 0.005:  # a node that was followed later may seem to be above it
        return hits
    return f"{hits}; {short:.2f} points short of the optimum"


def count(number: int, what: str) -> str:
    """`1 step`, `1,234 steps`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def times(number: int) -> str:
    return {0: "never", 1: "once"}.get(number, f"{number:,} times")


def _gateway_rows(facts: Facts) -> dict[str, str]:
    answered = [f"{num:,} with {status}" for status, num in facts["answered"].items()]
    return {
        "serves": facts["url"],
        "requests": f"{facts['under_way']:,} under way, {', '.join(answered) or 'none'} answered",
        "left early": count(facts["gone"], "client"),
    }


def _worker_rows(facts: Facts) -> dict[str, str]:
    rows = {"answered": f"{facts['answered']:,} requests, {facts['experts_computed']:,} experts"}
    if facts["hit_ratio"] is not None:
        rows["hit ratio"] = f"{facts['hit_ratio']:.1%} of the experts used were in memory"
    share = f", as {facts['share']}" if facts["share"] else ""
    return {
        **rows,
        "experts": f"{facts['resident']:,} in memory, room for {facts['slots']:,}",
        "store": f"{_held(facts)}{share}; {_lost(facts['store_reconnects'])}",
    }


def _lost(reopened: int) -> str:
    """How often a store was."""
    return "never lost" if not reopened else f"lost and opened again {times(reopened)}"


def _shadow_rows(facts: Facts) -> dict[str, str]:
    return {
        "followed": f"{count(facts['followed'], 'token')}; computed {facts['guessed']:,} before "
        f"they were said, {facts['guessed_right']:,} rightly",
        "aligned": f"keys and values of {count(facts['states'], 'token')}",
        "experts": f"{facts['resident']:,} in memory",
    }


_DAEMONS: dict[str, Callable[[Facts], dict[str, str]]] = {
    "expert_store": _store_rows,
    "compute_node": _node_rows,
    "scheduler": _scheduler_rows,
    "gateway": _gateway_rows,
    "worker": _worker_rows,
    "shadow": _shadow_rows,
}
