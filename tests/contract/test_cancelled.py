"""A prompt that is cancelled, wherever it is: the session stays, and the next answer is exact.

Planted faults seen red: the session ended and opened again, experts under way forgotten.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from compute_node.engine.request import Request
from compute_node.engine.sequence import SequenceState
from expert_store.offline.index import index
from proto import errors
from tests.contract.test_exactness import engine, prompt, reference

NUM_STEPS = 6


def test_a_cancelled_prompt_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = reference({}, "qwen3_moe", torch.bfloat16, tmp_path)
    index(expected.root, tmp_path / "store")
    with engine(tmp_path / "store", tmp_path) as node:
        caplog.clear()  # that it has no tokenizer is said at start
        num_cancelled = 0
        for num_checks in range(24):
            left = [None] * num_checks

            def check(left: list[None] = left) -> None:
                if not left:
                    raise errors.Cancelled("the caller went away")
                left.pop()

            request = Request(tuple(prompt()), 1, ignore_eos=True)
            try:
                list(node.generate(request, check))
            except errors.Cancelled:
                num_cancelled += 1
        sequence = SequenceState("s", prompt())
        logits = [node.prefill(sequence)]
        for _ in range(NUM_STEPS - 1):
            sequence.token_ids.append(int(logits[-1].argmax()))
            logits += node.decode([sequence])
        assert node.cache.lender.num_opened == 1  # type: ignore[attr-defined]
    assert num_cancelled > 8, "else this proves nothing"
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    for ours, theirs in zip(logits, expected.logits[:NUM_STEPS], strict=True):
        assert torch.equal(ours, theirs)
