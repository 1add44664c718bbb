"""What people watch of a running stack: the figures of one moment, for `flashmoe top` and the live
page.

None stands for what is not known now; shares and hit ratios are in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Spread:
    """p50, p95: half of the latest values, and 19 of 20, are not above these; num: how many"""

    p50: float
    p95: float
    num: int


@dataclass(frozen=True)
class Speed:
    """Of all answers together.

    tokens_per_s, prompt_tokens_per_s: over the last seconds
    first_token_s, between_tokens_s, queued_s: over the last minute
    """

    tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    first_token_s: Spread | None = None
    between_tokens_s: Spread | None = None
    queued_s: Spread | None = None


@dataclass(frozen=True)
class Clients:
    """open: requests for text that wait or run; waiting: for their first turn
    sequences: alive in the node; total, failed, refused: requests since the start
    kept_hits, tokens_saved: prompts that began like a kept conversation, and what they saved
    """

    open: int = 0
    waiting: int = 0
    total: int = 0
    failed: int = 0
    refused: int = 0
    sequences: int | None = None
    kept_hits: int | None = None
    tokens_saved: int | None = None


@dataclass(frozen=True)
class Experts:
    """hit_ratio: over the last seconds; hit_ratio_ever: since the start
    resident, slots: experts in memory, and how many have room
    """

    hit_ratio: float | None
    hit_ratio_ever: float | None
    resident: int
    slots: int


@dataclass(frozen=True)
class Disk:
    """busy_share: of the last seconds, with at least one read at the device
    read_s: of the last minute's records that somebody waited for
    damaged: experts that failed their checksum
    """

    bytes_per_s: float | None
    busy_share: float | None
    read_s: Spread | None
    damaged: int


@dataclass(frozen=True)
class Memory:
    """parts: bytes held now, the largest first; age_s: of the report"""

    ceiling_bytes: int
    current_bytes: int
    peak_bytes: int
    parts: Mapping[str, int]
    age_s: float


@dataclass(frozen=True)
class Policy:
    """What an eviction policy hits, or would hit, of the same stream under the same budget.

    title:  what it goes by
    regret: what the optimum hit more; None: it is the optimum
    """

    name: str
    title: str
    hit_ratio: float
    regret: float | None


@dataclass(frozen=True)
class Policies:
    """node: whose stream; why: that one is in charge; scores: the best first"""

    node: str
    in_charge: str
    why: str
    scores: tuple[Policy, ...]


@dataclass(frozen=True)
class Guarded:
    """A quality budget that somebody asked for, and what checks found of its route in force.

    kl, kl_high, kl_limit: nats a token: mean, bound on it that holds at every moment, budget
    top1: share of checked tokens whose likeliest successor is the exact one
    """

    budget: str
    route: str
    checks: int
    kl: float | None
    kl_high: float | None
    kl_limit: float
    top1: float | None
    tightened: int
    relaxed: int


@dataclass(frozen=True)
class HeatRow:
    """states: a digit for each expert of the layer, see ExpertState in proto/compute_node.proto"""

    layer: int
    states: str


@dataclass(frozen=True)
class Figures:
    """away:   daemons that do not answer, and why
    learning: why nothing is learned now; empty: it is
    stalls: share of the last seconds that compute waited for experts, by cause
    """

    at_s: float
    away: Mapping[str, str]
    speed: Speed = Speed()
    clients: Clients = Clients()
    experts: Experts | None = None
    disk: Disk | None = None
    memory: Memory | None = None
    policies: Policies | None = None
    learning: str = ""
    guards: tuple[Guarded, ...] = ()
    stalls: Mapping[str, float] = field(default_factory=dict)
    heat: tuple[HeatRow, ...] = ()
