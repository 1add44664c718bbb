"""flashmoe eval: perplexity as decode computes it, through a real stack, and what is said of it.

Planted faults seen red: the spread of one store's scores for that of differences, tokens taken for
independent, texts of unequal length compared, or of other tokens, a text begun after a cancel, a
missing card found after the work.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compute_node.client.result import ScoredToken
from deploy.lab.perplexity import Comparison, TextScore, TextScorer
from deploy.terminal.prompts import Prompt
from expert_store.offline.card import CARD_NAME
from expert_store.offline.pack import pack
from proto import errors
from tests.contract.test_exactness import align
from tests.stack import MODEL, flashmoe

TEXTS = ["The cat sat on the mat, and then it went away.", "def main():\n    return None\n"]


def nats(text: str, max_tokens: int) -> list[float]:
    """transformers' eager experts, one token at a time."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    model.set_experts_implementation("eager")
    align(model)
    found, cache = [], None
    token_ids = AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"][:max_tokens]
    with torch.inference_mode():
        for token_id, following in itertools.pairwise(token_ids):
            step = model(torch.tensor([[token_id]]), past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            found.append(-float(step.logits[0, -1].double().log_softmax(-1)[following]))
    return found


@pytest.mark.system
def test_perplexity_is_that_of_decode_and_goes_into_the_card(
    tiny_store: Path, tmp_path: Path
) -> None:
    """An int4 store against the exact one, whose figure transformers gives too."""
    pack(MODEL, tmp_path / "int4", weight_format="int4")
    text = tmp_path / "held.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXTS))
    arguments = ["--text", str(text), "--against", str(tiny_store), "--max-tokens", "20"]
    done = flashmoe("eval", str(tmp_path / "int4"), *arguments, "--card", "--json")
    assert done.returncode == 0, done.stderr
    assert "starting qwen3_moe in int4 (group 32, lossy)" in done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    expected = [value for line in TEXTS for value in nats(line, 10)]
    exact = found["against"]
    assert found["tokens"] == exact["tokens"] == len(expected) == 15
    assert exact["nats_per_token"] == pytest.approx(math.fsum(expected) / 15, rel=1e-12)
    assert exact["perplexity"] == pytest.approx(math.exp(exact["nats_per_token"]), rel=1e-12)
    assert (found["weights"], exact["weights"]) == ("int4 (group 32, lossy)", "exact")
    ratio = found["perplexity_ratio"]
    assert ratio["ratio"] == pytest.approx(found["perplexity"] / exact["perplexity"], rel=1e-9)
    assert ratio["low"] < ratio["ratio"] < ratio["high"] and ratio["ratio"] != 1
    card = (tmp_path / "int4" / CARD_NAME).read_text()
    assert f"| int4 (group 32, lossy) | 15 | {found['nats_per_token']:.4f} |" in card
    assert f"Ratio of perplexities: {ratio['ratio']:.5f}" in card


def test_a_store_without_a_card_is_refused_before_anything_runs(
    tiny_store: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXTS[0])
    done = flashmoe("eval", str(tiny_store), "--text", str(text), "--card")
    assert done.returncode == 2 and "starting" not in done.stderr
    assert "only stores packed with --format" in done.stderr


def test_a_route_without_a_memory_is_refused(tiny_store: Path, tmp_path: Path) -> None:
    """With all experts in memory no rule changes anything."""
    text = tmp_path / "text.txt"
    text.write_text(TEXTS[0])
    done = flashmoe("eval", str(tiny_store), "--text", str(text), "--route", "prior .1")
    assert done.returncode == 2 and "starting" not in done.stderr
    assert "--route and --quality change nothing where all experts are in memory" in done.stderr


def score(*log_probs: float, first_id: int = 5) -> TextScore:
    tokens = (ScoredToken(first_id + n, value) for n, value in enumerate(log_probs))
    return TextScore((tuple(tokens),), wall_s=2.0)


def test_figures_of_a_score() -> None:
    found = score(-math.log(2), -math.log(8))
    assert found.nats_per_token == pytest.approx(math.log(4))
    assert (found.perplexity, found.bits_per_token) == pytest.approx((4.0, 2.0))
    assert found.tokens_per_s == 1.0


def test_a_comparison_is_paired() -> None:
    """Texts are hard or easy for both alike: what counts is the difference token by token."""
    found = Comparison.of(score(-1.0, -5.0, -9.0, -2.0), score(-0.9, -4.9, -8.9, -1.9))
    assert (found.ratio, found.low, found.high) == pytest.approx([math.exp(0.1)] * 3)
    noisy = Comparison.of(score(-1.0, -3.0), score(-2.0, -2.0))
    assert noisy.ratio == 1.0
    assert (noisy.low, noisy.high) == pytest.approx((math.exp(-(2**0.5)), math.exp(2**0.5)))


def test_tokens_of_one_text_err_together() -> None:
    """Four tokens of two texts say no more than two."""

    def texts(*nats: float) -> TextScore:
        return TextScore(tuple((ScoredToken(1, -n),) * 2 for n in nats), wall_s=1.0)

    found = Comparison.of(texts(1.0, 1.2), texts(1.0, 1.0))
    assert (found.ratio, found.worst_text) == pytest.approx((math.exp(0.1), math.exp(0.2)))
    assert found.high == pytest.approx(math.exp(0.1 + 2 * 0.1))  # over tokens: 2 * 0.05


@pytest.mark.parametrize("other", [score(-1.0), score(-1.0, -1.0, first_id=6)])
def test_other_tokens_do_not_compare(other: TextScore) -> None:
    with pytest.raises(errors.InvalidRequest, match="stores of one checkpoint"):
        Comparison.of(score(-1.0, -1.0), other)


class FakeNode:
    """Scores a text as its length; hears of what was cancelled."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.asked: list[dict[str, Any]] = []

    def stats(self) -> SimpleNamespace:
        """50 bytes a text."""
        return SimpleNamespace(bytes_read=50 * len(self.asked))

    def score(self, text: str, **options: Any) -> Any:
        self.asked.append(options)
        node = self

        class Call(list[ScoredToken]):
            def cancel(self) -> None:
                node.cancelled += 1

        return Call([ScoredToken(1, -float(len(text)))])


def test_texts_are_scored_in_order() -> None:
    node, heard = FakeNode(), []
    scorer = TextScorer(node, max_tokens=7, context_tokens=3, route="skip .5")  # type: ignore[arg-type]
    texts = [Prompt("a", "xx"), Prompt("b", "xxxx")]
    found = scorer.run(texts, lambda number, text: heard.append((number, text.name)))
    assert [token.log_prob for token in found.scored] == [-2.0, -4.0]
    assert heard == [(0, "a"), (1, "b")]
    asked = {
        "max_tokens": 7,
        "context_tokens": 3,
        "route": "skip .5",
        "check_every": 0,
        "quality": "",
    }
    assert node.asked == [asked] * 2
    assert found.bytes_per_token == 50.0
    assert found.token_s == ((), ())


def test_cancelled_between_two_texts_no_other_begins() -> None:
    node = FakeNode()
    scorer = TextScorer(node, max_tokens=0, context_tokens=3)  # type: ignore[arg-type]
    scorer.run([Prompt("a", "x"), Prompt("b", "x")], lambda number, text: scorer.cancel())
    assert node.cancelled == 3, (
        "the first, through already; the second, as it began; and at its end"
    )
