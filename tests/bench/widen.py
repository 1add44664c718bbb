"""Widens every expert of a small checkpoint to records as large as those of big models, without
changing what it computes.

`python -m tests.bench.widen SRC OUT --record-mib 24`. Padding units have random input weights and
output weights of zero. The zeros have random signs: no block of the file is all zeros, so that no
disk can answer for one without reading it.

`--copies 4` gives four times as many experts, to see how cost grows with their number. This does
change what is computed, a little: every copy computes what its original does, but its router row is
the original's and as much noise, so that tokens choose among copies as among experts. Experts that
no router chooses would cost nothing; copies with the same row would tie.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

MIB = 1024 * 1024
_EXPERT = re.compile(r"\.experts\.(\d+)\.(gate|up|down)_proj\.weight$")
_ROUTER = re.compile(r"\.mlp\.gate\.weight$")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_HEADER_ALIGNMENT = 4096  # tensors begin on a page
_UNITS = 32  # every engine's kernels take rows of so many


@dataclass(frozen=True)
class WideTensor:
    """A tensor of the widened checkpoint. shape: [out, in]; make: reads and pads the original."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def length_bytes(self) -> int:
        return math.prod(self.shape) * torch.bfloat16.itemsize


def widen(source: Path, out: Path, record_bytes: int, copies: int = 1, seed: int = 0) -> None:
    """Write `source` with experts of `record_bytes` to `out`, a shard a layer, a tensor at a time.

    copies: of every expert
    Raises ValueError for a checkpoint that cannot be widened, OSError when the disk is too small.
    """
    config = json.loads((source / "config.json").read_text())
    inner_size = wide_inner_size(config, record_bytes)
    files = sorted(source.glob("*.safetensors"))
    num_experts = int(config.get("num_local_experts", config.get("num_experts", 0)))
    padding = Padding(inner_size, num_experts, copies, torch.Generator().manual_seed(seed))
    shards = _shards(list(_wide_tensors(files, padding)))
    _check_room(out, shards)
    unfinished = out.with_name(out.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".json" and not file.name.endswith(".index.json"):
            shutil.copy(file, unfinished)
    wide = {**config, "moe_intermediate_size": inner_size}
    for name in {"num_local_experts", "num_experts"} & config.keys():
        wide[name] = copies * config[name]
    (unfinished / "config.json").write_text(json.dumps(wide, indent=2))
    for name, tensors in shards.items():
        with (unfinished / name).open("wb") as shard:
            _write_shard(shard, tensors)
    (unfinished / "model.safetensors.index.json").write_text(json.dumps(_index(shards)))
    unfinished.rename(out)


def wide_inner_size(config: dict[str, Any], record_bytes: int) -> int:
    """F of experts of three matrices [F, D] in bf16 that fill `record_bytes`, or nearly.

    Raises ValueError when the checkpoint's experts are not smaller, or not in bf16.
    """
    if config.get("dtype") != "bfloat16" or "moe_intermediate_size" not in config:
        raise ValueError("only a bf16 checkpoint with moe_intermediate_size can be widened")
    row_bytes = 3 * int(config["hidden_size"]) * torch.bfloat16.itemsize
    inner_size = record_bytes // row_bytes // _UNITS * _UNITS
    if inner_size < config["moe_intermediate_size"]:
        raise ValueError(
            f"an expert has {config['moe_intermediate_size'] * row_bytes:,} bytes already: "
            f"give a larger record than {record_bytes:,}"
        )
    return inner_size


def pad_inputs(weight: Tensor, inner_size: int, generator: torch.Generator) -> Tensor:
    """gate_proj or up_proj, [F, D] -> [inner_size, D]; new rows are random, as large as the old."""
    extra = torch.randn(inner_size - weight.shape[0], weight.shape[1], generator=generator)
    return torch.cat([weight, (extra * weight.float().std()).to(weight.dtype)])


def pad_outputs(weight: Tensor, inner_size: int, generator: torch.Generator) -> Tensor:
    """down_proj, [D, F] -> [D, inner_size]; new columns are zeros of random sign."""
    count = inner_size - weight.shape[1]
    signs = torch.randint(0, 2, (weight.shape[0], count), generator=generator, dtype=torch.int16)
    zeros = (signs << 15).view(weight.dtype)
    return torch.cat([weight, zeros], dim=1)


def add_rows(router: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    """[E, D] -> [copies * E, D]: the router as it is, and again with as much noise."""
    spread = float(router.float().std())
    rows = [router]
    for _ in range(copies - 1):
        noise = spread * torch.randn(router.shape, generator=generator)
        rows.append((router.float() + noise).to(router.dtype))
    return torch.cat(rows)


@dataclass(frozen=True)
class Padding:
    """What every tensor is made into."""

    inner_size: int
    num_experts: int
    copies: int
    generator: torch.Generator

    def names(self, name: str) -> Iterator[str]:
        """Under which a tensor is written: once, or once a copy of its expert."""
        expert = _EXPERT.search(name)
        if not expert:
            yield name
            return
        for copy in range(self.copies):
            number = copy * self.num_experts + int(expert[1])
            yield f"{name[: expert.start(1)]}{number}{name[expert.end(1) :]}"

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        expert = _EXPERT.search(name)
        if expert:
            down = expert[2] == "down"
            return (shape[0], self.inner_size) if down else (self.inner_size, shape[1])
        return (self.copies * shape[0], *shape[1:]) if _ROUTER.search(name) else shape

    def apply(self, name: str, weight: Tensor) -> Tensor:
        expert = _EXPERT.search(name)
        if expert:
            pad = pad_outputs if expert[2] == "down" else pad_inputs
            return pad(weight, self.inner_size, self.generator)
        if _ROUTER.search(name):
            return add_rows(weight, self.copies, self.generator)
        return weight


def _wide_tensors(files: Iterable[Path], padding: Padding) -> Iterator[WideTensor]:
    """Raises ValueError when no tensor is an expert's, or one is not in bf16."""
    found = False
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            shapes = {name: _bf16_shape(tensors, name) for name in tensors.keys()}  # noqa: SIM118
        found |= any(_EXPERT.search(name) for name in shapes)
        for name, shape in shapes.items():
            make = partial(_make, file, name, padding)
            for copied in padding.names(name):
                yield WideTensor(copied, padding.shape(name, shape), make)
    if not found:
        raise ValueError("the checkpoint has no experts.N.gate_proj, up_proj and down_proj")


def _bf16_shape(tensors: Any, name: str) -> tuple[int, ...]:
    header = tensors.get_slice(name)
    if header.get_dtype() != "BF16":
        raise ValueError(f"{name} is {header.get_dtype()}, not BF16")
    return tuple(header.get_shape())


def _make(file: Path, name: str, padding: Padding) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return padding.apply(name, tensors.get_tensor(name))


def _shards(tensors: Iterable[WideTensor]) -> dict[str, list[WideTensor]]:
    """File name -> its tensors: a file a layer, and one for what is in no layer."""
    groups: dict[int, list[WideTensor]] = {}
    for tensor in tensors:
        match = _LAYER.search(tensor.name)
        groups.setdefault(int(match[1]) + 1 if match else 0, []).append(tensor)
    return {
        f"model-{number + 1:05}-of-{len(groups):05}.safetensors": groups[group]
        for number, group in enumerate(sorted(groups))
    }


def _check_room(out: Path, shards: dict[str, list[WideTensor]]) -> None:
    needed = sum(tensor.length_bytes for tensors in shards.values() for tensor in tensors)
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if needed + MIB > free:
        raise OSError(
            errno.ENOSPC,
            f"the widened checkpoint needs {needed // MIB:,} MiB, {out.parent} has "
            f"{free // MIB:,} MiB free: make room, or give a smaller record",
        )


def _write_shard(file: BinaryIO, tensors: list[WideTensor]) -> None:
    """The safetensors format: length of the header, header, bytes in its order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.length_bytes]
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": offsets}
        at += tensor.length_bytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _HEADER_ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        file.write(tensor.make().contiguous().view(torch.uint8).numpy().tobytes())


def _index(shards: dict[str, list[WideTensor]]) -> dict[str, Any]:
    total = sum(tensor.length_bytes for tensors in shards.values() for tensor in tensors)
    places = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
    return {"metadata": {"total_size": total}, "weight_map": places}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a small bf16 MoE checkpoint")
    parser.add_argument("out", type=Path, help="folder of the widened one")
    parser.add_argument("--record-mib", type=float, default=24.0, help="MiB an expert")
    parser.add_argument("--copies", type=int, default=1, help="times as many experts")
    chosen = parser.parse_args()
    try:
        widen(chosen.source, chosen.out, int(chosen.record_mib * MIB), chosen.copies)
    except OSError as error:
        sys.exit(f"widen: {error.strerror or error}")
    except ValueError as error:
        sys.exit(f"widen: {error}")


if __name__ == "__main__":
    main()
