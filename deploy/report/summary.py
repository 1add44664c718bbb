"""What one generation was and cost: for a person on stderr, for a script as one JSON object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from compute_node.client.result import Phase, Result
from deploy.terminal import console
from proto.memory_report import MemoryReport
from proto.quality import EXACT_NAME

_ENDS = {"stop": "ended by itself or at a stop string", "length": "cut at --max-tokens"}


def print_summary(result: Result, report: MemoryReport | None) -> None:
    console.err.print(console.table("", summary_rows(result, report)))
    for warning in result.warnings:
        console.say(f"warning: {warning}")


def summary_rows(result: Result, report: MemoryReport | None) -> dict[str, str]:
    """report: None where no launcher measures memory."""
    decode, num_tokens = result.decode, len(result.token_ids)
    has_decoded = bool(decode.tokens and decode.wall_s)
    end = _ENDS.get(result.finish_reason, result.finish_reason)
    tokens = f"{num_tokens:,} token{'' if num_tokens == 1 else 's'}, {end}"
    rows = {
        "tokens/s": f"{result.tokens_per_s:.1f} ({tokens})" if has_decoded else f"- ({tokens})",
        "time to first token": f"{result.ttft_s:.2f} s ({result.prefill.tokens:,} prompt tokens)",
    }
    if has_decoded:
        rows |= _quality_rows(result) | _decode_rows(decode, result.prefill)
    if report is not None:
        rows["peak memory"] = (
            f"{console.size(report.peak_bytes)} of {console.size(report.ceiling_bytes)}"
        )
    return rows


def _decode_rows(decode: Phase, prefill: Phase) -> dict[str, str]:
    """Of what came after the first token, which is part of the prompt's cost."""
    hits = f"{decode.hit_ratio:.1%} of the experts used were in memory"
    if prefill.hits + prefill.misses:
        hits += f", {prefill.hit_ratio:.1%} for the prompt"
    compute_s = decode.wall_s - decode.stall_s
    return _changed_row(decode) | {
        "hit ratio": hits,
        "read per token": f"{console.size(decode.bytes_read / decode.tokens)}, "
        f"{_ms(decode.device_s, decode)} of the disk's time",
        "stall share": f"{decode.stall_s / decode.wall_s:.1%} of the time waited for experts",
        "time per token": f"{_ms(decode.wall_s, decode)}: {_ms(compute_s, decode)} computing, "
        f"{_ms(decode.stall_s, decode)} waiting",
    }


def _quality_rows(result: Result) -> dict[str, str]:
    """Which settings ran and what checks found; nothing where everything was exact."""
    if not any(result.routes):
        return {}
    total = sum(result.routes.values())
    shares = [f"{use / total:.0%} {route or EXACT_NAME}" for route, use in result.routes.items()]
    budget = f"budget {result.quality}: " if result.quality else ""
    rows = {"lossy": f"{budget}{', '.join(shares)}"}
    if found := result.estimate:
        rows["checked"] = (
            f"{found.checks:,} tokens by {found.route or EXACT_NAME}: KL {found.kl:.4f} "
            f"({found.kl_low:.4f} to {found.kl_high:.4f}) nats a token, {found.top1:.1%} "
            f"({found.top1_low:.1%} to {found.top1_high:.1%}) the exact model's likeliest"
        )
    return rows


def _changed_row(decode: Phase) -> dict[str, str]:
    """What a lossy route did; nothing where it did nothing."""
    counts = {
        "gave way": decode.substituted,
        "left out": decode.skipped,
        "in fewer bits": decode.small,
    }
    said = [f"{count / decode.tokens:.1f} {what}" for what, count in counts.items() if count]
    return {"experts a token": ", ".join(said)} if said else {}


def _ms(seconds: float, phase: Phase) -> str:
    return f"{seconds / phase.tokens * 1e3:.1f} ms"


def result_document(result: Result, report: MemoryReport | None) -> dict[str, Any]:
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "prompt_token_ids": result.prompt_token_ids,
        "finish_reason": result.finish_reason,
        "warnings": list(result.warnings),
        "ttft_s": result.ttft_s,
        "tokens_per_s": result.tokens_per_s,
        "hit_ratio": _phases(result, lambda phase: phase.hit_ratio),
        "bytes_read": _phases(result, lambda phase: phase.bytes_read),
        "stall_s": _phases(result, lambda phase: phase.stall_s),
        "wall_s": _phases(result, lambda phase: phase.wall_s),
        "uncovered_s": _phases(result, lambda phase: phase.uncovered_s),
        "device_s": _phases(result, lambda phase: phase.device_s),
        "quality": result.quality,
        "routes": result.routes,
        "quality_estimate": asdict(result.estimate) if result.estimate else None,
        "substituted": result.decode.substituted,
        "skipped": result.decode.skipped,
        "small": result.decode.small,
        "peak_memory_bytes": report.peak_bytes if report else None,
        "ceiling_bytes": report.ceiling_bytes if report else None,
        "memory_bytes_by_part": report.by_part if report else None,
        "cgroup_peak_bytes": report.cgroup_peak_bytes if report else None,
    }


def _phases(result: Result, value: Callable[[Phase], float]) -> dict[str, float]:
    return {"prefill": value(result.prefill), "decode": value(result.decode)}
