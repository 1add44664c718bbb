"""Reads a checkpoint's tokenizer and generation config. `index` reports what the node will do with
them, so both use this module. Code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from proto import errors
from proto.checkpoint.vocabulary import VOCABULARIES

GENERATION_CONFIG_NAME = "generation_config.json"
# One of the packages is enough: a tokenizer.model is of one kind or the other.
_PACKAGES = {
    "tokenizer.model": ("sentencepiece", "tiktoken"),
    "spiece.model": ("sentencepiece",),
    "sentencepiece.bpe.model": ("sentencepiece",),
    "tiktoken.model": ("tiktoken",),
}


def load_tokenizer(folder: Path) -> Any:
    """Load transformers' tokenizer of a checkpoint.

    Raises CheckpointUnsupported with the reason; token ids can still be used then, text cannot.
    """
    from transformers import AutoTokenizer

    found = _vocabulary(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        empty = not tokenizer("hello", add_special_tokens=False)["input_ids"]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        raise errors.CheckpointUnsupported(
            f"{folder}: its tokenizer ({found}) cannot be loaded: {_reason(error)}"
        ) from error
    if empty:
        raise errors.CheckpointUnsupported(
            f"{folder}: its tokenizer ({found}) makes no tokens of a word: download it again"
        )
    return tokenizer


def _vocabulary(folder: Path) -> str:
    """The file with the vocabulary. Raises CheckpointUnsupported when there is none, or when no
    package that reads it is installed.
    """
    found = next((name for name in VOCABULARIES if (folder / name).exists()), None)
    if found is None:
        raise errors.CheckpointUnsupported(f"{folder} has no tokenizer")
    packages = _PACKAGES.get(found)
    if packages and not any(map(importlib.util.find_spec, packages)):
        raise errors.CheckpointUnsupported(
            f"{folder}: its tokenizer ({found}) takes a package that is not installed: run "
            f"`pip install {packages[0]}`"
        )
    return found


def _reason(error: BaseException) -> str:
    if "custom code" in str(error):
        return "it needs code that comes with it, which is never run"
    return " ".join(str(error).split("\n\n")[0].split()) or repr(error)


def load_generation_config(folder: Path) -> Any:
    """Load transformers' GenerationConfig of a checkpoint; None when it has none.

    Raises CheckpointUnsupported when it is damaged: the end of a text would be a guess.
    """
    from transformers import GenerationConfig

    path = folder / GENERATION_CONFIG_NAME
    if not path.exists():
        return None
    try:
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        _check_eos(config.eos_token_id)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise errors.CheckpointUnsupported(
            f"{path} is damaged ({reason}): download it again, or remove it"
        ) from error
    return config


def _check_eos(eos: Any) -> None:
    """Raises ValueError."""
    ids = eos if isinstance(eos, list) else [eos]
    if eos is not None and not all(type(number) is int for number in ids):
        raise ValueError(f"eos_token_id is {eos!r}")
