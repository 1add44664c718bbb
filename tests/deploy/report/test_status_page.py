"""What `status` and the summary of a generation say, in words and units.

Faults seen red: `None`, `[]`, `device_bytes_per_s`, a version of thirteen digits, ratios named
after their variables, markup taken from a value, and no facts where there is no metrics page.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from compute_node.client import result
from deploy.report.status_page import status_rows
from deploy.report.summary import summary_rows
from deploy.terminal import console
from proto.memory_report import MemoryReport

STORE: dict[str, Any] = {
    "health": "SERVING",
    "demand_reads": 0,
    "bytes_read": 0,
    "shared_hits": 0,
    "prefetch_reads": 0,
    "prefetches_used": 0,
    "prefetches_withdrawn": 0,
    "prefetch_bytes_wasted": 0,
    "prefetch_bytes_read": 0,
    "prefetch_bytes_used": 0,
    "disk_busy_share": 0.0,
    "device_bytes_per_s": None,
    "slots_leased": 0,
    "slots_free": 260,
    "slots_filling": 0,
    "slots_reclaimable": 0,
    "sessions": 1,
    "orphaned_sessions": 0,
    "quarantined": [],
}
NODE: dict[str, Any] = {
    "health": "SERVING",
    "weights": "exact",
    "policy": "decayed",
    "hit_ratio": None,
    "resident": 0,
    "slots": 256,
    "requests": 0,
    "queued": 0,
    "live": 0,
    "turn": 16,
    "kept_prompts": "on",
    "kept_hits": 2,
    "tokens_saved": 1500,
    "kept_tokens": 2000,
    "kept_bytes": 8 << 20,
    "reserved_bytes": 0,
    "state_bytes": 64 << 20,
    "advice_age_s": None,
    "advice_version": 1795889147965,
    "advice_used": 0,
    "advice_fallbacks": 0,
    "evidence_sent": 0,
    "evidence_dropped": 0,
    "learning": "on",
    "store_reconnects": 0,
    "prefetch_depth": 3,
    "prefetch_precision": [],
    "prefetch_recall": None,
    "layers_without_stream": [],
    "layers_without_router": [],
    "foresight": [],
    "run_ahead": "on",
    "run_ahead_s": 1.25,
    "run_ahead_starts": 3,
    "stall_s": {},
}
SCORE = {"hit_ratio": 0.9, "windowed_hit_ratio": 0.95, "windowed_regret": 0.0123}
SCHEDULER: dict[str, Any] = {
    "health": "SERVING",
    "redis_connected": False,
    "learning": "off: Redis takes no advice",
    "events_seen": 0,
    "events_rejected": 0,
    "events_lost": 0,
    "steps_missed": 0,
    "labels_learned": 0,
    "log_loss": 0.0,
    "baseline_log_loss": 0.0,
    "advice_published": 0,
    "advice_age_s": None,
    "step_ms": 0.0,
    "cpu_share": 0.0,
    "nodes": {
        "node0": {
            "in_charge": "decayed",
            "why": "no other has led it yet",
            "switches": 0,
            "steps": 1,
            "slots": 256,
            "scope": "pool",
            "policies": {"decayed": SCORE, "min": SCORE | {"windowed_regret": 0.0}},
        }
    },
}


def worth(predictor: str, layers_ahead: int, recall: float | None) -> dict[str, Any]:
    """A line of the node's foresight."""
    return {"predictor": predictor, "layers_ahead": layers_ahead} | {
        "recall": recall,
        "precision": None,
    }


WORKER: dict[str, Any] = {
    "health": "SERVING",
    "hit_ratio": None,
    "resident": 3,
    "answered": 0,
    "experts_computed": 0,
    "experts_held": 86,
    "experts_total": 256,
    "slots": 64,
    "share": "share 1 of 3",
    "store_reconnects": 0,
}
BOX: dict[str, Any] = {
    "up": 1,
    "answered": 7,
    "late": 0,
    "failed": 0,
    "bytes_sent": 1024,
    "bytes_received": 1024,
    "experts_held": 86,
    "experts_total": 256,
    "slots": 64,
}
NEVER_JOINED = BOX | {"up": 0, "answered": 0, "experts_held": None, "slots": None}

BUSY = {
    "expert_store": STORE
    | {"bytes_read": 1 << 30, "device_bytes_per_s": 1 << 21}
    | {"prefetch_bytes_read": 1 << 22, "prefetch_bytes_used": 3 << 20, "disk_busy_share": 0.625}
    | {"demand_reads": 1, "quarantined": ["L07E113"]},
    "compute_node": NODE
    | {"hit_ratio": 0.9591, "advice_age_s": 1.74, "store_reconnects": 1}
    | {"prefetch_precision": [0.5, 0.25, 0.0], "prefetch_recall": 0.61}
    | {"foresight": [worth("next_router", 1, 0.125), worth("next_router", 2, 0.125)]}
    | {"stall_s": {"too_late": 0.5, "not_foreseen": 20.25}},
    "scheduler": SCHEDULER
    | {"redis_connected": True, "labels_learned": 1800, "log_loss": 0.2412, "events_lost": 3},
    "memory": {"ceiling_bytes": 1 << 30, "peak_bytes": 1 << 29, "current_bytes": 1 << 28}
    | {"age_s": 3600.4},
}
BOXES = {
    "compute_node": NODE | {"boxes": {"10.0.0.2:9400": BOX, "10.0.0.3:9400": NEVER_JOINED}},
    "worker": WORKER,
}
IDLE = {"expert_store": STORE, "compute_node": NODE, "scheduler": SCHEDULER}
AWAY = {name: {"health": "away"} for name in IDLE}


@pytest.mark.parametrize("found", [IDLE, BUSY, AWAY, BOXES], ids=["idle", "busy", "away", "boxes"])
def test_a_page_has_words_only(found: dict[str, Any]) -> None:
    pages = status_rows(found, dict.fromkeys(IDLE, "it was killed"))
    text = "\n".join(f"{name}: {value}" for rows in pages.values() for name, value in rows.items())
    assert not re.search(r"None|True|False|\[|\{|\d{7}|[a-z]_[a-z]", text), text


def test_what_a_page_says() -> None:
    busy = status_rows(BUSY, {})
    assert busy["expert store"]["read"] == "1.0 GiB at 2.0 MiB/s; 1 expert on demand, 0 ahead"
    assert busy["expert store"]["read ahead"].endswith(
        "0 bytes read for nothing; 75% of its bytes used"
    )
    assert busy["expert store"]["disk"] == "busy 62.5% of the time since the store started"
    assert busy["expert store"]["damaged"] == "L07E113: `flashmoe verify` names the files"
    assert busy["scheduler"]["evidence"] == "0 steps seen, 3 lost"
    assert busy["scheduler"]["learning"] == "off: Redis takes no advice"
    assert busy["memory"]["now"] == (
        "256.0 MiB of 1.0 GiB, 3,600 s ago: the launcher could not write it since"
    )
    node = busy["compute node"]
    assert node["learning"] == "on"
    assert node["hit ratio"] == "95.9% of the experts used were in memory"
    assert node["guesses"].startswith(
        "50%, 25%, 0% right, by layers ahead; 61% of what was missing"
    )
    assert node["guesses"].endswith("was guessed (by the next routers 25%)")
    assert node["run-ahead"] == "on; it used 1.2 s of waits, starting 3 times"
    unknown = {"layers_without_stream": ["1", "3"], "layers_without_router": ["0"]}
    blind = status_rows(BUSY | {"compute_node": BUSY["compute_node"] | unknown}, {})["compute node"]
    assert blind["guesses"].endswith(
        "; less surely of layers 1, 3: no residual stream was recognised; none of layers 0: their "
        "routers cannot be asked early"
    )
    assert node["waited"] == (
        "20.2 s for experts that nobody had guessed, 0.5 s for guessed ones that were not read yet"
    )
    assert node["store"] == "lost and opened again once"
    policies = busy["policies of node0"]
    assert policies["in charge"] == "decayed: no other has led it yet, never changed"
    assert policies["decayed"] == (
        "95.00% hits lately, 90.00% in all; 1.23 points short of the optimum"
    )
    assert busy["memory"]["at most"] == "512.0 MiB"
    idle = status_rows(IDLE, {})
    assert idle["compute node"]["hit ratio"] == "nothing was computed yet"
    assert idle["scheduler"]["Redis"] == "not reached: nothing is learned"
    away = status_rows(AWAY, {"scheduler": "it was killed"})
    assert away["scheduler"] == {"health": "away: it was killed"}


def test_which_experts_a_box_has_is_said_there_and_at_the_main_node() -> None:
    """Planted faults seen red: a share said to be all, `None` of a box that never joined."""
    pages = status_rows(BOXES, {})
    assert pages["worker"]["experts"] == "3 in memory, room for 64"
    assert pages["worker"]["store"] == "has 86 of 256 experts, as share 1 of 3; never lost"
    node = pages["compute node"]
    assert node["box 10.0.0.2:9400"].endswith("received; has 86 of 256 experts, room for 64")
    assert node["box 10.0.0.3:9400"].endswith("received")
    whole = WORKER | {"experts_held": 256, "share": "", "store_reconnects": 2}
    assert status_rows({"worker": whole}, {})["worker"]["store"] == (
        "has all 256 experts; lost and opened again 2 times"
    )


def test_a_table_keeps_its_lines_and_its_brackets() -> None:
    shown = Console(width=20, soft_wrap=True)
    with shown.capture() as capture:
        shown.print(console.table("title", {"a": "[bold]" + "x" * 40, "bcd": "y"}))
    assert capture.get() == f"title\na    [bold]{'x' * 40}\nbcd  y\n"


def finished(num_tokens: int) -> result.Result:
    decode = result.Phase(num_tokens - 1, 90, 10, 1 << 20, 0.2, 1.0, 0.1, 0.05)
    if num_tokens == 1:
        decode = result.Phase(0, 0, 0, 0, 0.0, 0.0)
    prefill = result.Phase(3, 0, 0, 0, 0.0, 0.1)
    ids = list(range(num_tokens))
    return result.Result("x", ids, [1], "length", 0.21, 10.0, 0.0, prefill, decode)


def test_a_summary_has_words_only() -> None:
    assert summary_rows(finished(11), MemoryReport(1 << 30, 1 << 29)) == {
        "tokens/s": "10.0 (11 tokens, cut at --max-tokens)",
        "time to first token": "0.21 s (3 prompt tokens)",
        "hit ratio": "90.0% of the experts used were in memory",
        "read per token": "102.4 KiB, 5.0 ms of the disk's time",
        "stall share": "20.0% of the time waited for experts",
        "time per token": "100.0 ms: 80.0 ms computing, 20.0 ms waiting",
        "peak memory": "512.0 MiB of 1.0 GiB",
    }


def test_a_summary_says_what_was_lossy() -> None:
    """And nothing of it where every token was exact."""
    estimate = result.QualityEstimate("skip 0.5", 50, 0.002, 0.001, 0.004, 0.98, 0.93, 0.99)
    routes = {"": 1, "skip 0.5": 9}
    lossy = replace(finished(11), quality="1%", routes=routes, estimate=estimate)
    rows = summary_rows(lossy, None)
    assert rows["lossy"] == "budget 1%: 10% exact, 90% skip 0.5"
    assert rows["checked"] == (
        "50 tokens by skip 0.5: KL 0.0020 (0.0010 to 0.0040) nats a token, 98.0% (93.0% to 99.0%) "
        "the exact model's likeliest"
    )
    named = replace(finished(11), routes={"skip 0.5": 10})
    assert summary_rows(named, None)["lossy"] == "100% skip 0.5"
    assert "lossy" not in summary_rows(replace(finished(11), routes={"": 10}), None)


def test_one_token_has_no_speed() -> None:
    assert summary_rows(finished(1), None) == {
        "tokens/s": "- (1 token, cut at --max-tokens)",
        "time to first token": "0.21 s (3 prompt tokens)",
    }
