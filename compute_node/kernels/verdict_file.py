"""The file that verdicts outlive a process in, so that a restart does not try again. It counts for
the machine, torch, transformers and compiled library that it was written with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash

from compute_node.kernels.verdicts import Key, Verdict
from compute_node.native import binding

_VERSION = 2
_CPUINFO = Path("/proc/cpuinfo")
_CPU_FACTS = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features")
# Each makes torch or its libraries add in another order.
_SETTINGS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR")


def read(path: Path, timed: bool) -> dict[str, dict[Key, Verdict]]:
    """By entry. timed: whether kernels are timed here.

    Raises OSError, and ValueError for a file of another machine and for a damaged one.
    """
    try:
        document = json.loads(path.read_bytes())
        if document["machine"] != _machine(timed):
            raise ValueError("they are of another CPU, torch or compiled library")
        body = document["verdicts"]
        if document["digest"] != _digest(body):
            raise ValueError("the file is damaged")
        return {
            entry: {_from_json(key): Verdict(int(way), float(ratio)) for key, way, ratio in rows}
            for entry, rows in json.loads(body).items()
        }
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the file is damaged: {error}") from error


def write(path: Path, known: Mapping[str, Mapping[Key, Verdict]], timed: bool) -> None:
    """All verdicts, whole or not at all. known: by entry. Raises OSError."""
    body = json.dumps(
        {
            entry: [[_to_json(key), *verdict] for key, verdict in verdicts.items()]
            for entry, verdicts in known.items()
        }
    )
    document = {"machine": _machine(timed), "digest": _digest(body), "verdicts": body}
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(document))
    beside.replace(path)


def _machine(timed: bool) -> dict[str, str]:
    """Whatever else a verdict depends on."""
    return {
        "version": str(_VERSION),
        "cpu": _cpu(),
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "transformers": transformers.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "library": binding.build_id(),
        "timed": str(timed),
        **{name: os.environ.get(name, "") for name in _SETTINGS},
    }


def _digest(body: str) -> str:
    return xxhash.xxh3_64_hexdigest(body.encode())


def _to_json(part: Any) -> Any:
    if isinstance(part, tuple):
        return [_to_json(inner) for inner in part]
    return {"dtype": str(part).removeprefix("torch.")} if isinstance(part, torch.dtype) else part


def _from_json(part: Any) -> Any:
    if isinstance(part, list):
        return tuple(_from_json(inner) for inner in part)
    return getattr(torch, part["dtype"]) if isinstance(part, dict) else part


@cache
def _cpu() -> str:
    lines = _CPUINFO.read_text().partition("\n\n")[0].splitlines()
    pairs = [line.partition(":") for line in lines]
    facts = {name.strip(): value.strip() for name, _, value in pairs}
    return "; ".join(f"{name}: {facts[name]}" for name in _CPU_FACTS if name in facts)
