"""What is known of the compiled kernels on this machine: for which shapes, tokens and threads they
give torch's bits. Verdicts outlive the process in a file, so that a restart does not try again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import xxhash

from compute_node.native import binding

logger = logging.getLogger(__name__)

_VERSION = 1
_CPUINFO = Path("/proc/cpuinfo")
_CPU_FACTS = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features")
# Each makes torch or its libraries add in another order.
_SETTINGS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR")

Key = tuple[Any, ...]


class Verdicts:
    """Of one entry: 0 where torch has to compute; else how the kernel gets torch's bits.

    A key says what the bits depend on: shape, dtype, bias, tokens, threads.
    """

    def __init__(self, entry: str) -> None:
        self.entry = entry
        self.known: dict[Key, int] = {}

    def prove(self, key: Key, compare: Callable[[], int]) -> int:
        """Ask `compare`, which tries the kernel beside torch, and keep what it says."""
        verdict = self.known[key] = int(compare())
        if not verdict or self is GEMV:
            kernel = "native" if verdict else "torch"
            facts = {"entry": self.entry, "key": str(key), "kernel": kernel}
            logger.info("kernel chosen", extra={**facts, "threads": torch.get_num_threads()})
        return verdict

    def count(self, native: bool) -> int:
        """Keys asked for or read from a file that the kernel computes, or that torch does."""
        return [verdict > 0 for verdict in self.known.values()].count(native)


GEMV, GEMM = Verdicts("gemv"), Verdicts("gemm")
LOSSLESS_GEMV, LOSSLESS_GEMM = Verdicts("lossless_gemv"), Verdicts("lossless_gemm")
ENTRIES = {v.entry: v for v in (GEMV, GEMM, LOSSLESS_GEMV, LOSSLESS_GEMM)}


def load(path: Path) -> None:
    """Take over what an earlier process proved on this machine, with this torch and this library.

    Any other file is left alone and said in one sentence: everything is proved again then.
    """
    if not binding.build_id():
        return
    try:
        found = _read(path.read_bytes())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        logger.warning(
            "kernel verdicts are proved again", extra={"path": str(path), "reason": str(error)}
        )
        return
    for entry, known in found.items():
        ENTRIES[entry].known.update(known)


def save(path: Path) -> None:
    """Write all verdicts, whole or not at all. A folder that cannot be written is said, no more."""
    if not binding.build_id():
        return
    body = json.dumps(
        {v.entry: [[_to_json(k), n] for k, n in v.known.copy().items()] for v in ENTRIES.values()}
    )
    document = {"machine": _machine(), "digest": _digest(body), "verdicts": body}
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(document))
        beside.replace(path)
    except OSError as error:
        logger.warning(
            "kernel verdicts are not kept", extra={"path": str(path), "reason": str(error)}
        )


def _read(content: bytes) -> dict[str, dict[Key, int]]:
    """By entry. Raises ValueError for a file of another machine, and for a damaged one."""
    try:
        document = json.loads(content)
        if document["machine"] != _machine():
            raise ValueError("they are of another CPU, torch or compiled library")
        body = document["verdicts"]
        if document["digest"] != _digest(body):
            raise ValueError("the file is damaged")
        return {
            entry: {_from_json(key): int(verdict) for key, verdict in json.loads(body)[entry]}
            for entry in ENTRIES
        }
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the file is damaged: {error}") from error


def _digest(body: str) -> str:
    return xxhash.xxh3_64_hexdigest(body.encode())


def _to_json(part: Any) -> Any:
    if isinstance(part, tuple):
        return [_to_json(inner) for inner in part]
    return str(part) if isinstance(part, torch.dtype) else part


def _from_json(part: Any) -> Any:
    if isinstance(part, list):
        return tuple(_from_json(inner) for inner in part)
    return getattr(torch, part.removeprefix("torch.")) if isinstance(part, str) else part


def _machine() -> dict[str, str]:
    """Whatever else a verdict depends on."""
    return {
        "version": str(_VERSION),
        "cpu": _cpu(),
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "library": binding.build_id(),
        **{name: os.environ.get(name, "") for name in _SETTINGS},
    }


@cache
def _cpu() -> str:
    lines = _CPUINFO.read_text().partition("\n\n")[0].splitlines()
    pairs = [line.partition(":") for line in lines]
    facts = {name.strip(): value.strip() for name, _, value in pairs}
    return "; ".join(f"{name}: {facts[name]}" for name in _CPU_FACTS if name in facts)
