"""The file that a tokenizer is made of: the first of those that there are."""

from __future__ import annotations

from pathlib import Path

from proto.checkpoint.vocabulary import vocabulary_bytes


def test_the_file_that_a_tokenizer_is_made_of(tmp_path: Path) -> None:
    """Red when a later name wins."""
    assert vocabulary_bytes(tmp_path) == 0
    (tmp_path / "vocab.json").write_bytes(bytes(3))
    assert vocabulary_bytes(tmp_path) == 3
    (tmp_path / "tokenizer.json").write_bytes(bytes(5))
    assert vocabulary_bytes(tmp_path) == 5
