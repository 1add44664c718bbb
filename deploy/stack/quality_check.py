"""Whether a stack can keep the quality that it is asked for by default, before it starts."""

from __future__ import annotations

from pathlib import Path

from deploy.settings import ServeSettings
from deploy.terminal import console
from proto import errors
from proto.quality import Budget, QualityCard


def check_quality(
    settings: ServeSettings, store_dir: Path, fingerprint: str, experts_bytes: int
) -> str:
    """What to know of the store's quality card, a sentence; empty: nothing.

    Raises InvalidRequest for a default that is no budget, ConfigInvalid where there is no card for
    it, QualityCardInvalid.
    """
    budget, path = Budget.parse(settings.default_quality), settings.quality_card(store_dir)
    if path is None:
        if budget.fraction:
            raise errors.ConfigInvalid(
                f"quality {budget} needs a quality card, and {store_dir} has none: run `flashmoe "
                f"tune {store_dir} --text FILES` with the memory that it will be served with"
            )
        return ""
    return _fit(QualityCard.load(path, fingerprint), path, budget, experts_bytes)


def _fit(card: QualityCard, path: Path, budget: Budget, experts_bytes: int) -> str:
    if card.experts_bytes != experts_bytes:
        return (
            f"{path} was measured with {console.size(card.experts_bytes)} for experts, this stack "
            f"has {console.size(experts_bytes)}: quality and speed will differ, run `flashmoe "
            "tune` again with this memory"
        )
    if budget.fraction and len(card.ladder(budget)) == 1:
        return (
            f"quality {budget} buys nothing by {path}, so everything stays exact: allow more, or "
            "run `flashmoe tune` on more text"
        )
    return ""
