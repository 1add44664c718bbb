"""The table of a run, and whether its figures count."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from compute_node.engine.usage import Usage
from deploy.plan.budget import MemoryPlan
from expert_store.manifest.manifest import Manifest
from tests.bench.scale.node import Run
from tests.bench.scale.segments import Segment
from tests.bench.table import percentile, show, spread

MIB = 1024 * 1024
HEADER = [
    "--memory",
    "slots",
    "policy",
    "tokens/s",
    "step p50 ms",
    "p95 ms",
    "MiB/token",
    "hit %",
    "waiting %",
    "others' CPU",
]


@dataclass(frozen=True)
class Cell:
    """What was run."""

    memory: str
    policy: str
    round_number: int


@dataclass
class Results:
    """runs:      what was measured
    replayed:  hits of each counted step, as the scheduler's shadows count them
    fresh:     digests of the first round's first steps without a cache
    advice_us: what scoring a step takes the scheduler, by policy
    pss_bytes: of this process and the store, the most after any run, by ceiling
    """

    runs: dict[Cell, Run] = field(default_factory=dict)
    replayed: dict[Cell, list[int]] = field(default_factory=dict)
    fresh: list[int] = field(default_factory=list)
    advice_us: dict[str, float] = field(default_factory=dict)
    pss_bytes: dict[str, int] = field(default_factory=dict)


def print_table(
    results: Results,
    plans: Mapping[str, MemoryPlan],
    manifest: Manifest,
    segments: Sequence[Segment],
    trace_name: str,
    elapsed_s: int,
) -> None:
    spec, segment = manifest.spec, segments[0]
    print(
        f"gpt-oss-20b's geometry, random weights: {manifest.expert_bytes_total / 1e9:.2f} GB of "
        f"experts in {spec.weight_format}, {spec.num_experts_total} of "
        f"{manifest.slot_bytes / MIB:.1f} MiB; {manifest.sizing.dense_bytes / 1e9:.2f} GB of bf16 "
        "outside them\n"
        f"routing of {trace_name}: {len(segments)} segments of other generations, each after "
        f"{segment.warmup_steps} steps of warm-up {segment.num_counted} counted; {elapsed_s} s\n"
        "computed: the whole model, one token a step. Routers are computed and overruled by the "
        "recording, so nothing can be prefetched.\nNot in it: the warm-up's reads and compute "
        "(its hits and misses are), prompts; the context begins with the counted steps.\n"
        f"Advice is a step late, as live, and told by this process between steps: {_costs(results)}"
        "\n"
    )
    for memory, pss_bytes in results.pss_bytes.items():
        print(f"{memory}: node and store came to {pss_bytes / MIB:,.0f} MiB (sum of PSS)")
    print()
    measured = {cell.memory: plans[cell.memory] for cell in results.runs}
    rows = [row for memory, plan in measured.items() for row in _rows(results, memory, plan)]
    num_rounds = len({cell.round_number for cell in results.runs})
    rounds = f"Median (min-max) of {num_rounds} rounds" if num_rounds > 1 else "One round"
    show(f"{rounds}, policies in turn", HEADER, rows)


def _costs(results: Results) -> str:
    costs = (f"{name} {us / 1000:.1f} ms" for name, us in results.advice_us.items())
    return f"{', '.join(costs)} a step would be the scheduler's"


def _rows(results: Results, memory: str, plan: MemoryPlan) -> list[list[object]]:
    names = dict.fromkeys(cell.policy for cell in results.replayed)
    slots = f"{plan.slots} ({plan.slots / plan.num_experts:.0%})"
    rows = []
    for name in sorted(names, key=lambda one: _mean_hits(results, memory, one)):
        runs = [r for c, r in results.runs.items() if (c.memory, c.policy) == (memory, name)]
        figures = _figures(runs)
        if not runs:
            per_step = next(iter(results.runs.values())).steps[0]
            num_accesses = per_step.hits + per_step.misses
            ratio = _mean_hits(results, memory, name) / num_accesses
            figures = ["replayed only", "", "", "", f"{100 * ratio:.1f}", "", ""]
        rows.append([memory, slots, name, *figures])
    return rows


def _mean_hits(results: Results, memory: str, name: str) -> float:
    """A step."""
    found = [h for c, h in results.replayed.items() if (c.memory, c.policy) == (memory, name)]
    return statistics.fmean(hits for one in found for hits in one)


def _figures(runs: Sequence[Run]) -> list[object]:
    if not runs:
        return []
    walls_ms = [[1000 * step.wall_s for step in run.steps] for run in runs]

    def over(figure: Callable[[Sequence[Usage]], float], digits: int = 1) -> str:
        return _spread([figure(run.steps) for run in runs], digits)

    return [
        _spread([run.tokens_per_s for run in runs], 2),
        _spread([percentile(one, 0.5) for one in walls_ms], 0),
        _spread([percentile(one, 0.95) for one in walls_ms], 0),
        over(lambda steps: statistics.fmean(step.bytes_read for step in steps) / MIB, 0),
        over(lambda s: 100 * _share(s, lambda u: u.hits, lambda u: u.hits + u.misses)),
        over(lambda s: 100 * _share(s, lambda u: u.stall_s, lambda u: u.wall_s), 0),
        f"{max(run.others_ratio for run in runs):.0%}",
    ]


def _spread(values: Sequence[float], digits: int) -> str:
    return spread(values, digits) if len(values) > 1 else f"{values[0]:.{digits}f}"


def _share(
    steps: Sequence[Usage], part: Callable[[Usage], float], whole: Callable[[Usage], float]
) -> float:
    return sum(map(part, steps)) / sum(map(whole, steps))


def print_checks(results: Results) -> bool:
    """Whether every run gave the same bits, and hit what the scheduler's replay says."""
    differing = differing_steps(results)
    num_steps = sum(len(run.steps) for run in results.runs.values())
    print(
        f"bits: logits of {num_steps} steps compared between policies and ceilings, "
        f"{len(results.fresh) * len(_of_first_round(results))} of them with experts read alone "
        f"from the file in ascending order: {differing} differ"
    )
    miscounted = miscounted_steps(results)
    print(f"hits: {miscounted} steps differ from the scheduler's replay of the same policy")
    return not differing and not miscounted and num_steps > 0


def differing_steps(results: Results) -> int:
    """Steps whose logits are not those of the first run over their segment, or not those computed
    without a cache.
    """
    first: dict[int, list[int]] = {}
    for cell, run in results.runs.items():
        first.setdefault(cell.round_number, run.digests)
    pairs = [
        pair
        for cell, run in results.runs.items()
        for pair in zip(run.digests, first[cell.round_number], strict=True)
    ]
    for run in _of_first_round(results):
        pairs += zip(run.digests, results.fresh, strict=False)
    return sum(one != other for one, other in pairs)


def _of_first_round(results: Results) -> list[Run]:
    return [run for cell, run in results.runs.items() if cell.round_number == 0]


def miscounted_steps(results: Results) -> int:
    return sum(
        step.hits != hits
        for cell, run in results.runs.items()
        for step, hits in zip(run.steps, results.replayed[cell], strict=True)
    )
