"""What `flashmoe cluster status` shows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from deploy.cluster.config import ClusterConfig
from deploy.settings import parse_bytes
from deploy.terminal import console

if TYPE_CHECKING:  # it needs the extra
    from deploy.cluster.members import Members

Facts = dict[str, Any]


def collect(config: ClusterConfig, members: Members) -> dict[str, Facts]:
    """By box: state (serving, starting, failed, absent, away ...), reason, restarts, daemons and
    bytes. A box that has an actor and is not in the file has state `removed`.
    """
    found = {}
    for box in config.boxes:
        facts = members.report(box.name)
        status = json.loads(facts.pop("status", None) or "{}")
        memory = status.pop("memory", {})
        listens = {"listen": box.address} if hasattr(box, "address") else {}
        found[box.name] = {
            "host": box.host,
            **listens,
            **facts,
            "ceiling_bytes": parse_bytes(box.memory, "memory"),
            "stack_bytes": memory.get("current_bytes"),
            "daemons": {name: one.get("health") for name, one in status.items()},
            "boxes": status.get("compute_node", {}).get("boxes", {}),
            "shadow_nodes": status.get("compute_node", {}).get("shadow_nodes", {}),
        }
    for name in set(members.kept()) - set(found):
        found[name] = {"state": "removed", "reason": "`flashmoe cluster up FILE` ends it"}
    return found


def pages(boxes: dict[str, Facts]) -> dict[str, dict[str, str]]:
    """Titles and rows."""
    return {name: _rows(facts) for name, facts in boxes.items()}


def _rows(facts: Facts) -> dict[str, str]:
    rows = {"state": facts["state"] + (f": {facts['reason']}" if facts.get("reason") else "")}
    if "host" in facts:
        rows["address"] = facts.get("listen") or facts["host"]
    if "restarts" in facts:
        rows["restarts"] = str(facts["restarts"])
    for name, health in facts.get("daemons", {}).items():
        rows[name] = str(health)
    for address, box in facts.get("boxes", {}).items():
        rows[f"worker {address}"] = "takes work" if box.get("up") else "away"
    for address, shadow in facts.get("shadow_nodes", {}).items():
        rows[f"shadow {address}"] = "follows" if shadow.get("up") else "away"
    if facts.get("ray_bytes") is not None:
        rows["memory"] = _memory(facts)
    return rows


def _memory(facts: Facts) -> str:
    stack, ray = facts["stack_bytes"] or 0, facts["ray_bytes"]
    return (
        f"{console.size(stack + ray)} of {console.size(facts['ceiling_bytes'])}: daemons "
        f"{console.size(stack)}, Ray {console.size(ray)}"
    )
