"""Whether text will work with a checkpoint, found out before its weights are read. Offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from expert_store.offline.checkpoint.progress import Warn
from proto import errors
from proto.checkpoint.text_files import load_generation_config, load_tokenizer

_SAMPLE = "hello world"


def check_text(root: Path, model: Any, warn: Warn) -> None:
    """Warn where text will not work; token ids do, so nothing is refused for it.

    model: its embedding says which ids it knows
    Raises CheckpointUnsupported for a damaged generation config.
    """
    load_generation_config(root)
    try:
        tokenizer = load_tokenizer(root)
    except errors.CheckpointUnsupported as error:
        warn(f"{error}; text needs a tokenizer, token ids still work")
        return
    num_ids = model.get_input_embeddings().weight.shape[0]
    last_id = max(tokenizer.get_vocab().values())
    if last_id >= num_ids:
        warn(
            f"{root}: its tokenizer has ids up to {last_id}, the model knows {num_ids}: text with "
            "others is refused; see whether the tokenizer is this model's"
        )
    back = tokenizer.decode(tokenizer(_SAMPLE)["input_ids"], skip_special_tokens=True)
    if back.strip().lower() != _SAMPLE:
        warn(
            f"{root}: its tokenizer gives {_SAMPLE!r} back as {back!r}: see whether its files "
            "belong together"
        )
