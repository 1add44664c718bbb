"""A quality card in plain words: what a setting buys, what it costs, on which text and memory."""

from __future__ import annotations

from collections.abc import Sequence

from deploy.terminal import console
from proto.quality import Budget, QualityCard, Setting

BUDGETS = ("0.1%", "0.5%", "1%", "2%")
HEADER = (
    "setting",
    "tokens/s",
    "ms a token, p50 / p95",
    "read a token",
    "of exact",
    "perplexity x (two errors)",
    "worst text",
    "KL, nats",
    "same token",
)
_RULES = {
    "prior": "an expert in memory is preferred to one on the disk that the router scores little "
    "higher",
    "substitute": "an expert of low score on the disk gives way to one in memory of like score",
    "skip": "an expert of little weight on the disk is left out",
    "precision": "an expert of little weight is read in few bits",
}


def rows(settings: Sequence[Setting]) -> list[tuple[str, ...]]:
    """One a setting, as `HEADER` names the columns."""
    return [
        (
            setting.route or "exact",
            f"{setting.tokens_per_s:.1f}",
            f"{setting.token_ms_p50:.1f} / {setting.token_ms_p95:.1f}",
            console.size(setting.bytes_per_token),
            f"{setting.bytes_ratio:.3f}",
            f"{setting.perplexity:.4f} ({setting.perplexity_low:.4f} to "
            f"{setting.perplexity_high:.4f})",
            f"{setting.worst_text:.3f}",
            "-" if setting.kl is None else f"{setting.kl:.4f}",
            "-" if setting.top1 is None else f"{setting.top1:.1%}",
        )
        for setting in settings
    ]


def bought(card: QualityCard, setting: Setting) -> str:
    """What a setting buys and what it costs, in two or three sentences."""
    exact = card.exact
    if setting.is_exact:
        return (
            f"Everything stays exact: {exact.tokens_per_s:.1f} tokens/s, "
            f"{console.size(exact.bytes_per_token)} read a token."
        )
    sentences = [
        f"`{setting.route}` decodes {setting.tokens_per_s:.1f} tokens/s where exact decodes "
        f"{exact.tokens_per_s:.1f} ({setting.tokens_per_s / exact.tokens_per_s:.2f} x), and reads "
        f"{console.size(setting.bytes_per_token)} a token instead of "
        f"{console.size(exact.bytes_per_token)} ({setting.bytes_ratio:.2f} x).",
        f"It costs perplexity: {setting.perplexity:.4f} times exact's, between "
        f"{setting.perplexity_low:.4f} and {setting.perplexity_high:.4f} (two standard errors), "
        f"and {setting.worst_text:.3f} times on the text that suffers most.",
    ]
    if setting.kl is not None and setting.top1 is not None:
        sentences.append(
            f"Of 1,000 tokens, {1000 * setting.top1:.0f} are the likeliest of the exact model, too "
            f"(KL {setting.kl:.4f} nats a token)."
        )
    return " ".join(sentences)


def document(card: QualityCard, model_name: str, chosen: Setting, wish: str) -> str:
    """The card as Markdown. wish: what was asked for, as "a quality budget of 1%"."""
    lines = [
        f"# Quality card of {model_name}",
        "",
        f"Asked for {wish}. {bought(card, chosen)}",
        "",
        *_explained(chosen),
        f"Measured by `flashmoe tune` with {console.size(card.experts_bytes)} of memory for "
        f"experts, on {card.num_texts} passages of {card.texts}, {card.num_tokens:,} tokens for "
        "each setting, token by token as decode computes them. Another text, memory or disk has "
        "other figures: measure on what the model is used for.",
        "",
        "## What a budget buys",
        "",
        *_table(("budget", *HEADER[:2], *HEADER[4:6]), _budget_rows(card)),
        "",
        "`flashmoe serve --quality BUDGET` makes a budget the default of all requests, and "
        "`flashmoe generate --quality BUDGET` of one; without, everything is exact.",
        "",
        "## Every setting that was measured",
        "",
        *_table(HEADER, _marked(card)),
        "",
        "Those in bold are the frontier: no other is both as fast and as true.",
        "",
    ]
    return "\n".join(lines)


def _explained(setting: Setting) -> list[str]:
    """A sentence for each rule of a setting."""
    names = [part.split()[0] for part in setting.route.split("+") if part.strip()]
    known = [f"- {name}: {_RULES[name]}." for name in names if name in _RULES]
    return [*known, ""] if known else []


def _budget_rows(card: QualityCard) -> list[tuple[str, ...]]:
    found = []
    for text in BUDGETS:
        (row,) = rows(card.ladder(Budget.parse(text))[-1:])
        found.append((text, *row[:2], *row[4:6]))
    return found


def _marked(card: QualityCard) -> list[tuple[str, ...]]:
    frontier = {setting.route for setting in card.frontier}
    ordered = sorted(card.settings, key=lambda setting: (not setting.is_exact, setting.token_ms))
    return [
        (f"**{row[0]}**" if setting.route in frontier else row[0], *row[1:])
        for setting, row in zip(ordered, rows(ordered), strict=True)
    ]


def _table(header: Sequence[str], found: Sequence[Sequence[str]]) -> list[str]:
    cells = [header, ["---"] * len(header), *found]
    return ["| " + " | ".join(row) + " |" for row in cells]
