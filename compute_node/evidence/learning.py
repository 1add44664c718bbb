"""Whether this node's use of experts is learned from, and if not, why."""

from __future__ import annotations

from compute_node.evidence.advice import AdviceFeed
from compute_node.evidence.log import AccessLog

_PATIENCE_EVENTS = 512  # a scheduler that is well answers after some


def obstacle(access_log: AccessLog | None, advice: AdviceFeed | None) -> str:
    """Why nothing is learned now, or what is learned does not arrive; empty when all is well.

    access_log, advice: None without Redis
    """
    if access_log is None or advice is None:
        return "no redis_url is set"
    if found := access_log.obstacle or advice.obstacle:
        return found
    if advice.age_s is None and access_log.num_sent > _PATIENCE_EVENTS:
        return f"no advice came for {access_log.num_sent:,} events: see the scheduler"
    if advice.is_stale:
        return f"the last advice is {advice.age_s:.0f} s old: see the scheduler"
    return ""
