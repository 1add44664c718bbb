"""A checkpoint with an expert a tensor, moved into one with all experts of a layer in a tensor.

transformers computes with the latter, and accelerate can offload it only from there in place. Each
layer's file is deleted once it is written anew, so that two copies never need room.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")
_INDEX = "model.safetensors.index.json"


def fuse(checkpoint: Path, out: Path) -> None:
    """Moves `checkpoint` to `out`; called again after an interruption, it goes on."""
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(exist_ok=True)
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            fused = fuse_tensors({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
            written = partial / (file.name + ".writing")
            save_file(fused, written, metadata={"format": "pt"})
        written.rename(partial / file.name)
        file.unlink()
    (partial / _INDEX).write_text(json.dumps(_index(partial)))
    for file in checkpoint.iterdir():
        if file.name != _INDEX:
            file.rename(partial / file.name)
    (checkpoint / _INDEX).unlink()
    checkpoint.rmdir()
    partial.rename(out)


def fuse_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of each layer gate_up_proj [E, 2F, D] and down_proj [E, D, F]; others as they are."""
    fused: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[str, int], Tensor]] = {}
    for name, tensor in tensors.items():
        match = _EXPERT.match(name)
        if match:
            experts.setdefault(match[1], {})[match[3], int(match[2])] = tensor
        else:
            fused[name] = tensor
    for path, found in experts.items():
        numbers = sorted({number for _, number in found})
        fused[f"{path}.gate_up_proj"] = torch.stack(
            [torch.cat([found["gate", n], found["up", n]]) for n in numbers]
        )
        fused[f"{path}.down_proj"] = torch.stack([found["down", n] for n in numbers])
    return fused


def _index(folder: Path) -> dict[str, object]:
    places: dict[str, str] = {}
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        total += file.stat().st_size
        with safe_open(file, framework="pt") as tensors:
            places |= dict.fromkeys(tensors.keys(), file.name)
    return {"metadata": {"total_size": total}, "weight_map": places}
