"""Tokenizer and generation files as people have them: loaded, or named in one sentence.

Planted faults seen red: any `except` but BaseException (the tokenizers library panics), an empty
vocabulary taken for a tokenizer, remote code asked for, end-of-text ids of any kind.
"""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from proto import errors
from proto.checkpoint import text_files
from proto.checkpoint.text_files import load_generation_config, load_tokenizer
from tests.stack import MODEL


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The shipped model without its weights."""
    ignored = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(MODEL, tmp_path / "model", ignore=ignored))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(errors.CheckpointUnsupported, match=match) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def edit_tokenizer(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_whole_is_loaded(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer("In the beginning")["input_ids"]) == "In the beginning"
    assert load_generation_config(folder).eos_token_id == 0


@pytest.mark.parametrize("config", [True, False])
def test_no_vocabulary_is_no_tokenizer(config: bool, folder: Path) -> None:
    """Red: transformers makes an empty tokenizer for such a folder, and every prompt empty."""
    (folder / "tokenizer.json").unlink()
    if not config:
        (folder / "tokenizer_config.json").unlink()
    refused(folder, "has no tokenizer")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"7", b"\xff\xfe", b"[" * 60_000])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_is_named(name: str, data: bytes, folder: Path) -> None:
    (folder / name).write_bytes(data)
    refused(folder, r"its tokenizer \(tokenizer\.json\) cannot be loaded: ")


def test_a_file_that_ends_early_is_named(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:5000])
    refused(folder, "cannot be loaded")


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"model": {"type": "Unigram", "unk_id": 5, "vocab": []}},
        {"model": {"type": "NoSuchModel"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated"}},
    ],
    ids=["panic", "empty", "unknown", "regex"],
)
def test_what_the_library_cannot_read_is_named(changes: dict[str, Any], folder: Path) -> None:
    edit_tokenizer(folder, **changes)
    refused(folder, "cannot be loaded")


def test_a_vocabulary_of_nothing_is_named(folder: Path) -> None:
    edit_tokenizer(folder, model={"type": "BPE", "vocab": {}, "merges": []})
    refused(folder, "makes no tokens of a word")


@pytest.mark.parametrize(
    ("name", "package"), [("tokenizer.model", "sentencepiece"), ("tiktoken.model", "tiktoken")]
)
def test_a_package_that_is_not_there_is_named(
    name: str, package: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files.importlib.util, "find_spec", lambda _: None)
    (folder / "tokenizer.json").rename(folder / name)
    refused(folder, rf"{name}\) takes a package that is not installed: run `pip install {package}`")


def test_tiktoken_and_sentencepiece_vocabularies_are_converted(folder: Path) -> None:
    """By transformers, where its packages are installed."""
    pytest.importorskip("tiktoken", reason="transformers reads these with tiktoken")
    ranks = [f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "tiktoken.model").write_text("".join(ranks))
    tokenizer = load_tokenizer(folder)
    assert tokenizer("hello")["input_ids"] == list(b"hello")
    pytest.importorskip("sentencepiece", reason="transformers reads these with sentencepiece")
    (folder / "tiktoken.model").unlink()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(folder))
    assert load_tokenizer(folder)("the word")["input_ids"]


def sentencepiece_model(folder: Path) -> bytes:
    import sentencepiece

    text = folder / "text.txt"
    text.write_text("in the beginning was the word\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "trained"), vocab_size=20, minloglevel=2
    )
    return (folder / "trained.model").read_bytes()


def test_code_that_comes_with_a_tokenizer_is_never_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when transformers asks: here the answer is yes, and the file would be there."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.T", "own.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    assert load_tokenizer(folder).decode(load_tokenizer(folder)("hello")["input_ids"]) == "hello"
    (folder / "config.json").write_text('{"model_type": "own"}')
    refused(folder, "needs code that comes with it, which is never run")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"eos_token_id": "x"}', '{"eos_token_id": [1, "x"]}', "\0"]
)
def test_a_damaged_generation_config_is_named(text: str, folder: Path) -> None:
    """Red: some of these ended in a traceback, with others a text would never have ended."""
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(errors.CheckpointUnsupported, match=r"generation_config.json is damaged"):
        load_generation_config(folder)
    (folder / "generation_config.json").unlink()
    assert load_generation_config(folder) is None


def test_ids_that_end_a_text_may_be_one_or_several_or_none(folder: Path) -> None:
    for eos in (3, [3, 4], None):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert load_generation_config(folder).eos_token_id == eos
