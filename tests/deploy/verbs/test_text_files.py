"""A checkpoint without a tokenizer that loads: index says so, and the node serves token ids.

Planted faults seen red: nothing said at index, the node ended by a broken tokenizer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from deploy.verbs.index import index
from deploy.verbs.pack import pack
from deploy.verbs.plan import plan
from proto import errors
from tests.checkpoints import make
from tests.stack import MODEL, served


@pytest.fixture(scope="module")
def mute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with a tokenizer that ends early."""
    root = Path(shutil.copytree(MODEL, tmp_path_factory.mktemp("mute") / "model"))
    (root / "tokenizer.json").write_bytes((MODEL / "tokenizer.json").read_bytes()[:1000])
    return root


def test_index_pack_and_plan_say_it_and_go_on(
    mute: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index(mute, tmp_path / "indexed")
    pack(mute, tmp_path / "packed")
    plan(mute, "1GiB")
    said = [line for line in capsys.readouterr().err.splitlines() if "cannot be loaded" in line]
    assert len(said) == 3
    assert all(line.startswith("flashmoe: ") for line in said)
    assert all("text needs a tokenizer, token ids still work" in line for line in said)


def test_of_a_missing_or_another_models_tokenizer_it_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model knows 128 tokens, the shipped tokenizer has 8,192."""
    root = make("qwen3_moe", tmp_path / "checkpoint")
    capsys.readouterr()
    index(root, tmp_path / "without")
    assert "has no tokenizer; text needs" in capsys.readouterr().err
    shutil.copyfile(MODEL / "tokenizer.json", root / "tokenizer.json")
    index(root, tmp_path / "foreign")
    assert "has ids up to 8191, the model knows 128" in capsys.readouterr().err


def test_a_sound_checkpoint_is_warned_of_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index(MODEL, tmp_path / "store")
    assert "flashmoe: " not in capsys.readouterr().err


def test_files_that_do_not_belong_together_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer that loses blanks, as transformers makes of another family's vocabulary."""
    root = Path(shutil.copytree(MODEL, tmp_path / "model"))
    tokenizer = json.loads((root / "tokenizer.json").read_text())
    tokenizer["decoder"] = {"type": "Replace", "pattern": {"String": "\u0120"}, "content": ""}
    (root / "tokenizer.json").write_text(json.dumps(tokenizer))
    index(root, tmp_path / "store")
    assert "gives 'hello world' back as 'helloworld'" in capsys.readouterr().err


def test_a_damaged_generation_config_is_refused_before_reading(tmp_path: Path) -> None:
    root = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (root / "generation_config.json").write_text("{")
    with pytest.raises(errors.CheckpointUnsupported, match="generation_config"):
        index(root, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_paths_with_brackets_are_said_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Red: "[/b]" was taken for markup, a traceback after everything was hashed."""
    root = make("qwen3_moe", tmp_path / "my [/b] model")
    index(root, tmp_path / "st[/b]ore")
    said = capsys.readouterr()
    assert "st[/b]ore" in said.out
    assert "my [/b] model has no tokenizer" in said.err


@pytest.mark.system
def test_the_node_serves_token_ids_and_says_why_no_text(
    mute: Path, tmp_path: Path, run_dir: Path
) -> None:
    index(mute, tmp_path / "store")
    with served(tmp_path / "store", run_dir) as stack:
        assert len(stack.generate([5, 6, 7], max_tokens=4)) == 4
        with pytest.raises(errors.InvalidRequest, match="no tokenizer, its log says why"):
            stack.generate("In the beginning")
        assert "cannot be loaded" in stack.run.log("compute_node").read_text()
