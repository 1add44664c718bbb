"""The table: medians and spread over runs, a row an engine under a limit."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from tests.bench.peers.run import Answer, Case, RunResult
from tests.bench.table import percentile, show, spread

MIB = 1024 * 1024
HEADER = [
    "limit",
    "engine",
    "runs",
    "tokens/s",
    "token p50 ms",
    "p95 ms",
    "first token s",
    "cold",
    "MiB/token",
    "faults/token",
    "peak MiB",
    "others' CPU",
]


def print_table(results: Sequence[RunResult]) -> None:
    """A table a read-ahead, rows by limit."""
    for read_ahead in sorted({result.case.read_ahead_bytes for result in results}):
        chosen = [r for r in results if r.case.read_ahead_bytes == read_ahead]
        prompts = max(result.case.num_prompts for result in chosen)
        show(
            f"Read-ahead {read_ahead // 1024} KiB: a cold prompt and {prompts - 1} warm ones a run "
            "(accelerate: 2), median (min-max)",
            HEADER,
            _rows(chosen),
        )
        for reason in sorted({_failure(run) for run in chosen if run.failure}):
            print(f"  {reason}\n")


def print_sameness(results: Sequence[RunResult], names: Sequence[str]) -> None:
    """Whether variants of ours gave the same tokens to the same prompt and seed, at every limit."""
    given: dict[tuple[int, str], set[tuple[int, ...]]] = {}
    count = 0
    for run in results:
        if run.case.engine in names:
            for answer in run.answers:
                count += 1
                tokens = given.setdefault((run.case.round_number, answer.prompt), set())
                tokens.add(tuple(answer.token_ids))
    differing = sum(len(tokens) > 1 for tokens in given.values())
    if count > len(given):
        print(
            f"{' and '.join(names)}, all limits: {count} answers to {len(given)} prompts and seeds,"
            f" {differing} of them not token for token the same\n"
        )


def _rows(results: Sequence[RunResult]) -> list[list[str]]:
    groups: dict[tuple[float, str], list[RunResult]] = {}
    for result in results:
        share = 1000.0 if result.case.share is None else result.case.share
        groups.setdefault((-share, result.case.engine), []).append(result)
    return [_row(groups[key]) for key in sorted(groups)]


def _row(runs: Sequence[RunResult]) -> list[str]:
    case = runs[0].case
    limit = _limit(case)
    if any(run.failure for run in runs):
        return [limit, case.engine, str(len(runs)), "failed", *[""] * (len(HEADER) - 4)]
    warm = [run.answers[1:] for run in runs]
    return [
        limit,
        case.engine,
        str(len(runs)),
        _over(warm, speed),
        _over(warm, lambda answers: latency_ms(answers, 0.5), 0),
        _over(warm, lambda answers: latency_ms(answers, 0.95), 0),
        _over(warm, lambda answers: statistics.median(a.ttft_s for a in answers), 2),
        spread([run.answers[0].ttft_s for run in runs], 2),
        _over(warm, lambda answers: per_token(answers, lambda a: a.decode_bytes) / MIB, 0),
        _over(warm, lambda answers: per_token(answers, lambda a: a.decode_faults), 0),
        f"{max(run.peak_bytes for run in runs) / MIB:.0f}",
        f"{max(run.others_ratio for run in runs):.0%}",
    ]


def _limit(case: Case) -> str:
    return "none" if case.share is None else f"{case.share:g} %"


def _failure(run: RunResult) -> str:
    return f"{run.case.engine} at {_limit(run.case)}: {run.failure}"


def _over(
    runs: Sequence[Sequence[Answer]],
    figure: Callable[[Sequence[Answer]], float],
    digits: int = 2,
) -> str:
    return spread([figure(answers) for answers in runs], digits)


def speed(answers: Sequence[Answer]) -> float:
    """Decode tokens a second, harmonic mean over prompts."""
    return statistics.harmonic_mean([answer.tokens_per_s for answer in answers])


def latency_ms(answers: Sequence[Answer], share: float) -> float:
    return 1000 * percentile([s for answer in answers for s in answer.latencies_s], share)


def per_token(answers: Sequence[Answer], count: Callable[[Answer], int]) -> float:
    """Of decode."""
    return sum(map(count, answers)) / sum(len(answer.latencies_s) for answer in answers)
