"""A context longer than the model was trained for: said at start and in the answer.

Planted fault seen red: max_position_embeddings never read.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from compute_node.engine.engine import Engine, Finished
from compute_node.engine.request import Request
from expert_store.offline.index import index
from tests.checkpoints import make
from tests.contract.test_exactness import engine


def test_it_is_said_at_start_and_in_the_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint is trained for 256."""
    root = make("qwen3_moe", tmp_path / "checkpoint")
    index(root, tmp_path / "store")
    with engine(tmp_path / "store", tmp_path) as node:
        assert not [r for r in caplog.records if "trained" in r.message], "256 is within 256"
        longer = Engine(node.loaded, node.cache, root, 300, 256)
        (record,) = [r for r in caplog.records if "trained" in r.message]
        assert (record.tokens, record.trained_tokens) == (300, 256)  # type: ignore[attr-defined]
        *_, within = longer.generate(Request((5,) * 250, 6, ignore_eos=True))
        *_, beyond = longer.generate(Request((5,) * 250, 7, ignore_eos=True))
    assert isinstance(within, Finished) and within.warnings == ()
    assert isinstance(beyond, Finished)
    (warning,) = beyond.warnings
    assert "make 257 tokens" in warning and "trained for 256" in warning
