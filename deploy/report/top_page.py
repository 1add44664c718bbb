"""One frame of `flashmoe top`: a stack's live figures on a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from compute_node.live.figures import Disk, Experts, Figures, Guarded, Memory, Policies, Spread
from compute_node.live.words import POLICIES, called
from deploy.report.heat_map import heat_map
from deploy.terminal import console

_BAR_CELLS = 20
_OLD_S = 5.0  # of a memory report, which is written twice a second


def frame(figures: Figures, terminal: Console, height: int) -> RenderableType:
    """At most `height` lines where that is possible: the heat map takes what the rest leaves."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    for name, shown in _rows(figures):
        rows.add_row(name, shown)
    parts: list[RenderableType] = [_title(figures), Text(), rows, Text()]
    if figures.heat:
        num_left = height - len(terminal.render_lines(Group(*parts), pad=False))
        parts.append(heat_map(figures.heat, terminal.width, num_left))
    return Group(*parts)


def _title(figures: Figures) -> Text:
    clock = time.strftime("%H:%M:%S", time.localtime(figures.at_s))
    speed = figures.speed.tokens_per_s
    title = Text.assemble(
        ("FlashMoE", "bold"),
        f"  {clock}  ",
        ("-" if speed is None else f"{speed:.1f}", "bold green"),
        " tokens/s",
    )
    if prompt := figures.speed.prompt_tokens_per_s:
        title.append(f", {prompt:,.0f} prompt tokens/s")
    for name, why in figures.away.items():
        title.append(f"\n{name} is away: {why}", "bold red")
    return title


def _rows(figures: Figures) -> Iterator[tuple[str, RenderableType]]:
    yield "requests", _clients(figures)
    yield "latency", _latency(figures)
    if figures.experts:
        yield "hit ratio", _experts(figures.experts)
    if figures.disk:
        yield "disk", _disk(figures.disk)
    yield "waits", _stalls(figures)
    if figures.memory:
        yield "memory", _memory(figures.memory)
    if figures.policies:
        yield from _policies(figures.policies)
    elif figures.learning:
        yield "policies", Text(f"not compared: {figures.learning}")
    for guard in figures.guards:
        yield f"quality {guard.budget}", _guard(guard)


def _clients(figures: Figures) -> Text:
    clients = figures.clients
    text = f"{clients.open:,} open, {clients.waiting:,} waiting; {clients.total:,} since the start"
    if clients.sequences is not None:
        text += f"; {clients.sequences:,} sequences take turns"
    if clients.refused or clients.failed:
        text += f"; {clients.refused:,} found the queue full, {clients.failed:,} failed"
    if clients.kept_hits:
        saved = clients.tokens_saved or 0
        text += f"; {clients.kept_hits:,} conversations went on, {saved:,} tokens saved"
    return Text(text)


def _latency(figures: Figures) -> Text:
    speed = figures.speed
    parts = {
        "first token": speed.first_token_s,
        "between tokens": speed.between_tokens_s,
        "in the queue": speed.queued_s,
    }
    shown = [f"{name} {spread(found)}" for name, found in parts.items() if found]
    return Text("; ".join(shown) or "nothing was computed yet")


def spread(found: Spread) -> str:
    """`31 ms (95 % below 45 ms)`."""
    return f"{duration(found.p50)} (95 % below {duration(found.p95)})"


def duration(seconds: float) -> str:
    """`0.31 ms`, `31 ms`, `1.3 s`."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    milliseconds = 1000 * seconds
    return f"{milliseconds:.2f} ms" if milliseconds < 1 else f"{milliseconds:.0f} ms"


def _experts(experts: Experts) -> Text:
    ever = experts.hit_ratio_ever
    if ever is None:
        return Text(f"nothing was computed yet; room for {experts.slots:,} experts")
    text = bar(experts.hit_ratio or 0.0, "green")
    lately = "nothing lately" if experts.hit_ratio is None else f"{experts.hit_ratio:.1%} lately"
    return text.append(
        f" {lately}, {ever:.1%} since the start; {experts.resident:,} experts in memory, "
        f"room for {experts.slots:,}"
    )


def _disk(disk: Disk) -> Text:
    text = bar(disk.busy_share or 0.0, "yellow")
    text.append(f" {disk.busy_share or 0:.0%} busy, {console.size(disk.bytes_per_s or 0)}/s")
    if disk.read_s:
        text.append(f"; a read takes {spread(disk.read_s)}")
    if disk.damaged:
        text.append(f"; {disk.damaged:,} experts are damaged", "bold red")
    return text


def _stalls(figures: Figures) -> Text:
    text = bar(sum(figures.stalls.values()), "magenta")
    total = sum(figures.stalls.values())
    causes = ", ".join(f"{share:.0%} {cause}" for cause, share in figures.stalls.items())
    return text.append(f" {total:.0%} of the time" + (f": {causes}" if causes else ""))


def _memory(memory: Memory) -> Text:
    text = bar(memory.current_bytes / max(1, memory.ceiling_bytes), "cyan")
    text.append(f" {console.size(memory.current_bytes)} of {console.size(memory.ceiling_bytes)}: ")
    text.append(", ".join(f"{name} {console.size(held)}" for name, held in memory.parts.items()))
    if memory.age_s > _OLD_S:
        text.append(f"; {memory.age_s:,.0f} s old: the launcher is away", "bold red")
    return text


def _policies(policies: Policies) -> Iterator[tuple[str, RenderableType]]:
    in_charge = called(POLICIES, policies.in_charge)
    yield "policies", Text(f"{in_charge} is in charge: {policies.why}")
    best = policies.scores[0].hit_ratio if policies.scores else 0.0
    for score in policies.scores:
        is_in_charge = score.name == policies.in_charge
        line = bar(score.hit_ratio, "green" if score.hit_ratio == best else "blue")
        lost = "points" if score.regret is None else f"{-100 * score.regret or 0.0:.2f}"
        style = "bold" if is_in_charge else ""
        yield "", line.append(f" {score.hit_ratio:6.2%} {lost:>6}  {score.title}", style)


def _guard(guard: Guarded) -> Text:
    text = f"{guard.route}; {guard.checks:,} tokens checked"
    if guard.kl is not None and guard.kl_high is not None:
        text += f", KL {guard.kl:.4f} nats (surely below {guard.kl_high:.4f}, limit "
        text += f"{guard.kl_limit:.4f})"
    if guard.top1 is not None:
        text += f", {guard.top1:.1%} the same token"
    return Text(f"{text}; tightened {guard.tightened:,}, relaxed {guard.relaxed:,} times")


def bar(share: float, colour: str) -> Text:
    filled = round(min(1.0, max(0.0, share)) * _BAR_CELLS)
    return Text.assemble(("━" * filled, colour), ("─" * (_BAR_CELLS - filled), "dim"))
