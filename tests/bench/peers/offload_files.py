"""A fused checkpoint as the files that accelerate's disk_offload reads: one of raw bytes a tensor.

Run by the peers' own environment: `python -m tests.bench.peers.offload_files SRC OUT`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import offload_weight, save_offload_index
from safetensors import safe_open

_TIED = {"model.embed_tokens.weight": "lm_head.weight"}


def write(source: Path, out: Path) -> None:
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    index: dict[str, Any] = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                tensor = tensors.get_tensor(name)
                offload_weight(tensor, name, partial, index)
                if name in _TIED:
                    offload_weight(tensor, _TIED[name], partial, index)
    save_offload_index(index, partial)
    partial.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a fused checkpoint")
    parser.add_argument("out", type=Path, help="the folder to write")
    chosen = parser.parse_args()
    write(chosen.source, chosen.out)


if __name__ == "__main__":
    main()
