"""Finds the file that a tokenizer is made of. Imports nothing: the launcher asks, too."""

from __future__ import annotations

from pathlib import Path

# Each of these may hold a vocabulary. Without one, transformers makes an empty tokenizer.
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def vocabulary_bytes(folder: Path) -> int:
    """Of the file that a tokenizer is made of; 0 where there is none."""
    sizes = ((folder / name).stat().st_size for name in VOCABULARIES if (folder / name).exists())
    return next(sizes, 0)
