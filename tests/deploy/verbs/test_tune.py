"""flashmoe tune: a card from a real stack, and what it refuses before anything runs.

Planted faults seen red: the fingerprint left out, memory for all experts taken.
"""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from deploy.stack.stack_plan import load_store
from proto.quality import QUALITY_NAME, QualityCard
from tests.stack import FLASHMOE, ROOT, flashmoe

TEXT = (ROOT / "README.md").read_text()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.mark.system
def test_writes_a_card_that_is_read(tiny_store: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "q.json"
    arguments = ["--text", str(text), "--experts-memory", "37.5%", "--out", str(out)]
    arguments += ["--max-tokens", "96", "--passage-tokens", "24", "--settings", "2"]
    done = flashmoe("tune", str(tiny_store), *arguments, "--quality", "20%", "--json")
    assert done.returncode == 0, done.stderr
    card = QualityCard.load(out, load_store(tiny_store).spec.fingerprint)
    assert [one.route for one in card.settings] == ["", "skip 0.5", "skip 0.75"]
    assert (card.num_texts, card.num_tokens, card.texts) == (4, 92, "text.txt")
    assert card.num_checked == 22 and all(one.kl is not None for one in card.settings)
    assert card.exact.bytes_per_token > card.settings[1].bytes_per_token > 0
    assert all(setting.token_ms_p95 > 0 for setting in card.settings)
    printed = json.loads(done.stdout)
    assert printed["chosen"]["route"] in {one.route for one in card.settings}
    assert printed["settings"] == [one.model_dump() for one in card.settings]
    assert "asked for a quality budget of 20%" in (tmp_path / "q.md").read_text().lower()
    assert "<svg" in (tmp_path / "q.svg").read_text()
    assert "1/2 skip 0.5: perplexity x" in done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt", "q.json", "q.md", "q.svg"}


@pytest.mark.system
def test_interrupted_it_leaves_nothing(tiny_store: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "q.json"
    out.write_text("an older card")
    command = ["tune", str(tiny_store), "--text", str(text), "--experts-memory", "37.5%"]
    command += ["--max-tokens", "96", "--passage-tokens", "24", "--out", str(out)]
    with subprocess.Popen(
        [*FLASHMOE, *command], stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as tuning:
        assert tuning.stderr is not None
        try:
            for line in tuning.stderr:
                if "1/" in line:
                    tuning.send_signal(signal.SIGINT)
        finally:
            tuning.terminate()
    assert tuning.returncode == 130
    assert out.read_text() == "an older card"
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt", "q.json"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--experts-memory", "100%"], "all experts are in this memory"),
        ([], "give --memory"),
        (["--experts-memory", "37.5%", "--quality", "exact"], "exact needs no tuning"),
        (["--experts-memory", "37.5%", "--quality", "1"], "is no budget"),
        (["--experts-memory", "37.5%", "--out", "/nowhere/q.md"], "ends in .json"),
        (["--experts-memory", "37.5%", "--out", "/nowhere/q.json"], "give --out FILE"),
    ],
)
def test_refuses_before_anything_runs(
    tiny_store: Path, text: Path, arguments: list[str], says: str
) -> None:
    done = flashmoe("tune", str(tiny_store), "--text", str(text), *arguments)
    assert done.returncode == 2 and says in done.stderr and "starting" not in done.stderr
    assert not (tiny_store / QUALITY_NAME).exists()
