"""Folders that people give and that are no checkpoint to read: each kind by its name, with the way
out. Reads config.json and the first bytes of a file, never weights.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expert_store.manifest.manifest import MANIFEST_NAME
from proto import errors

CONFIG_NAME = "config.json"
SHARD_INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
_WANTED = "a bf16, fp16, fp32 or mxfp4 checkpoint in safetensors"
_SAVE_AGAIN = (
    "save it again in safetensors, with transformers' from_pretrained and save_pretrained, "
    "and give that folder"
)
_WEB_PAGE = "is a web page, not the file itself: download it again"
# What a file with another content than its name says begins with.
_FIRST_BYTES = {
    b"GGUF": f"is a GGUF file, for llama.cpp: give {_WANTED}",
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"PK\3\4": f"is a file of torch.save: {_SAVE_AGAIN}",
    b"<!DOCTYPE": _WEB_PAGE,
    b"<!doctype": _WEB_PAGE,
    b"<html": _WEB_PAGE,
    b"\0\0\0\0\0\0\0\0": "is empty or was only allocated: download it again",
}
_OTHER_WEIGHTS = {
    "*.gguf": f"a GGUF file, for llama.cpp: give {_WANTED}",
    "pytorch_model*.bin": f"PyTorch's own format: {_SAVE_AGAIN}",
    "*.pth": f"PyTorch's own format: {_SAVE_AGAIN}",
    "*.pt": f"PyTorch's own format: {_SAVE_AGAIN}",
    "consolidated*.safetensors": "its vendor's own layout: give the folder in transformers' layout",
    "*.msgpack": f"Flax's format: {_SAVE_AGAIN}",
    "*.h5": f"TensorFlow's format: {_SAVE_AGAIN}",
    "*.onnx": f"ONNX, for another engine: give {_WANTED}",
}


def check_folder(root: Path) -> None:
    """Raises CheckpointUnsupported when `root` is no folder of a checkpoint by what stands in it,
    ManifestInvalid when it cannot be looked into.
    """
    try:
        names = {path.name for path in root.iterdir()} if root.is_dir() else None
        problem = _no_folder(root) if names is None else _other_folder(root, names)
        if not problem:
            (root / CONFIG_NAME).exists()  # a folder that may be listed, and no more
    except OSError as error:
        raise errors.ManifestInvalid(
            f"{root} cannot be read ({error.strerror}): give this user the right to"
        ) from error
    if problem:
        raise errors.CheckpointUnsupported(f"{root} {problem}")


def _no_folder(root: Path) -> str:
    if root.exists():
        return next(_content(root), f"is a file: give the folder of {_WANTED}")
    name = os.path.relpath(root)
    if name.count("/") == 1 and not name.startswith(".."):
        return (
            "does not exist; if it is a model of a hub, download it first (`hf download "
            f"{name} --local-dir FOLDER`) and give the folder"
        )
    return "does not exist: give the folder of a checkpoint"


def _other_folder(root: Path, names: set[str]) -> str:
    """Empty for one that may hold a checkpoint."""
    if not names:
        return f"is empty: give the folder of {_WANTED}"
    if "snapshots" in names and CONFIG_NAME not in names:
        return f"is a model hub's cache of a model: give a folder in {root / 'snapshots'}"
    if "adapter_config.json" in names:
        return (
            "holds an adapter (adapter_config.json), which would not be applied: merge it into its "
            "model (merge_and_unload and save_pretrained of peft) and give that folder"
        )
    return ""


def _content(path: Path) -> Iterator[str]:
    """What a file begins with, if that is the mark of another format. Raises OSError."""
    with path.open("rb") as file:
        begin = file.read(32)
    yield from (said for mark, said in _FIRST_BYTES.items() if begin.startswith(mark))


def other_content(path: Path, otherwise: str = "is not a safetensors file") -> str:
    """What a file is that should be safetensors and is not, with what to do. Raises OSError."""
    return next(_content(path), f"{otherwise}: download it again")


def weights_missing(root: Path) -> errors.CheckpointUnsupported:
    """What to raise for a folder in which transformers would find no safetensors checkpoint."""
    if (root / MANIFEST_NAME).exists():
        return errors.CheckpointUnsupported(f"{root} is a store already: serve it as it is")
    shards = sorted(path.name for path in root.glob("*.safetensors") if _SHARD.search(path.name))
    if shards:
        return errors.CheckpointUnsupported(
            f"{root} has shards ({shards[0]}) but no {SHARD_INDEX}, which names them: download "
            "that file too"
        )
    for pattern, kind in _OTHER_WEIGHTS.items():
        if found := sorted(root.glob(pattern)):
            return errors.CheckpointUnsupported(f"{root} has weights in {found[0].name}, {kind}")
    others = [path.name for path in sorted(root.glob("*.safetensors"))]
    beside = f" (but {', '.join(others[:3])})" if others else ""
    return errors.CheckpointUnsupported(
        f"{root} has neither {SINGLE_FILE} nor {SHARD_INDEX}{beside}: "
        "give the folder of a Hugging Face checkpoint in safetensors format"
    )


def ignored_weights(root: Path) -> Iterator[str]:
    """A sentence for weights that stand there and are not read, as transformers does not."""
    if (root / SINGLE_FILE).is_file() and (root / SHARD_INDEX).is_file():
        yield (
            f"{root} has {SINGLE_FILE} beside the shards of {SHARD_INDEX}: it alone is read, as in "
            "transformers; move it away if the shards are meant"
        )


def read_config(root: Path) -> dict[str, Any]:
    """config.json as it stands. Raises CheckpointUnsupported saying what is wrong with it."""
    path = root / CONFIG_NAME
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise errors.CheckpointUnsupported(
            f"{root} has no {CONFIG_NAME}: download it again, config and all"
        ) from error
    except OSError as error:
        raise errors.CheckpointUnsupported(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise errors.CheckpointUnsupported(
            f"{path} is no JSON in UTF-8 without a byte order mark ({error}): download it again, "
            "or save it so"
        ) from error
    if not isinstance(found, dict):
        raise errors.CheckpointUnsupported(f"{path} is no JSON object: download it again")
    return found


def check_config(root: Path, config: dict[str, Any]) -> None:
    """Raises CheckpointUnsupported naming what has quantised the weights, mxfp4 apart."""
    if config.get("quantization"):
        raise _mlx(root)
    method = _quantised_by(config)
    if method not in (None, "mxfp4"):
        raise errors.CheckpointUnsupported(
            f"{root}: its weights are quantised on disk ({method}), which is not supported: "
            f"use {_WANTED}"
        )
    for name, nested in config.items():
        if isinstance(nested, dict) and (method := _quantised_by(nested)):
            raise errors.CheckpointUnsupported(
                f"{root}: the weights of its {name} are quantised on disk ({method}), which is not "
                f"supported: use {_WANTED}"
            )


def _quantised_by(config: dict[str, Any]) -> str | None:
    if config.get("compression_config"):
        return "compressed-tensors"
    found = config.get("quantization_config")
    if not found:
        return None
    return str(found.get("quant_method", "unknown") if isinstance(found, dict) else found)


def check_names(root: Path, names: Iterator[str]) -> None:
    """Raises CheckpointUnsupported when tensors are named as another engine names them."""
    if any(".switch_mlp." in name for name in names):
        raise _mlx(root)


def check_dtype(path: Path, name: str, dtype: Any) -> None:
    """Raises CheckpointUnsupported for a tensor of a dtype that only other formats have."""
    if dtype == "U32":
        raise errors.CheckpointUnsupported(
            f"{path}: tensor {name!r} is U32, as in weights that MLX has quantised: use {_WANTED}"
        )


def _mlx(root: Path) -> errors.CheckpointUnsupported:
    return errors.CheckpointUnsupported(
        f"{root} is an MLX checkpoint, for Apple's processors: use the one that it was made of, "
        f"{_WANTED}"
    )
