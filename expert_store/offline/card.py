"""The card of a store whose experts are not the checkpoint's own bytes: what it is, and what it
costs.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from proto import errors
from proto.weight_format import WeightFormat

CARD_NAME = "README.md"
SOURCE_CARD_NAME = "README.source.md"
_PERPLEXITY = "## Perplexity"
_MEASURE = (
    "Not measured yet. `flashmoe eval STORE --text FILE --against EXACT_STORE --card` scores\n"
    "held-out text with this store and with an exact one, and writes the figures here."
)


@dataclass(frozen=True)
class Card:
    """name: of the checkpoint's folder. Sizes are of all experts together, before and after.

    contents: how matrices are kept, as the format's encoder says it
    """

    name: str
    model_type: str
    weight_format: WeightFormat
    contents: str
    source_bytes: int
    packed_bytes: int

    def write(self, store_dir: Path) -> None:
        (store_dir / CARD_NAME).write_text(self._text())

    def _text(self) -> str:
        found = self.weight_format
        effect = "Output differs from the checkpoint's: this is lossy."
        if not found.lossy:
            effect = "The values are the checkpoint's own: this is not lossy."
        return f"""---
base_model: {self.name}
tags: [flashmoe, {found.name}]
---
# {self.name}, experts in {found}

A FlashMoE store of the {self.model_type} checkpoint `{self.name}`, made by
`flashmoe pack {self.name} --format {found.name}`. What the checkpoint says of itself, its licence
included, is in `{SOURCE_CARD_NAME}` if it came with a card.

{self.contents}
Biases, routers, attention, embeddings and everything else outside the experts are the checkpoint's
own. {effect}

Experts: {self.source_bytes:,} bytes in the checkpoint, {self.packed_bytes:,} here.

{_PERPLEXITY}

{_MEASURE}
"""


def check_card(store_dir: Path) -> None:
    """Before hours are spent: raises ManifestInvalid when the store has no card of ours, or one
    that cannot be written.
    """
    path = store_dir / CARD_NAME
    if not path.exists() or _PERPLEXITY not in path.read_text():
        raise errors.ManifestInvalid(
            f"{store_dir} has no {CARD_NAME} with a section {_PERPLEXITY!r}: only stores packed "
            "with --format have one"
        )
    if not os.access(path, os.W_OK):
        raise errors.ManifestInvalid(
            f"{path} cannot be written: leave --card out, or copy the store where it can be"
        )


def write_perplexity(store_dir: Path, figures: str) -> None:
    """Put what was measured into the card of a store. Raises as `check_card` does."""
    check_card(store_dir)
    path = store_dir / CARD_NAME
    section = re.compile(rf"^{re.escape(_PERPLEXITY)}$.*\Z", re.MULTILINE | re.DOTALL)
    path.write_text(section.sub(lambda _: f"{_PERPLEXITY}\n\n{figures}\n", path.read_text()))
