"""The model compared, in the format of every engine, on the peers' disk: made once, then kept."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench.peers.fused import fuse
from tests.bench.widen import MIB, widen
from tests.stack import MODEL, ROOT

CHECKPOINT, GGUF, STORE = "checkpoint", "model.gguf", "store"
FUSED, OFFLOADED = "fused", "offloaded"
_COPIES = 4  # GGUF file, packed store, accelerate's, and the checkpoint, which becomes fused
_ROOM = 1.06  # for the file system, and what is not in experts


@dataclass(frozen=True)
class PeerModel:
    """The shipped model, its experts padded to `record_bytes`."""

    record_bytes: int
    num_experts: int = 8 * 32

    @property
    def disk_bytes(self) -> int:
        """Of a disk that has room for every format."""
        return int(_COPIES * self.record_bytes * self.num_experts * _ROOM) + 256 * MIB

    def make(self, folder: Path, python: Path) -> None:
        """What is not there yet. python: of the peers' environment.

        Raises OSError, or CalledProcessError when a command fails.
        """
        if (folder / OFFLOADED).exists():  # made last
            return
        checkpoint, fused = folder / CHECKPOINT, folder / FUSED
        _once(checkpoint, lambda out: widen(MODEL, out, self.record_bytes))
        _once(folder / GGUF, partial(_by_peer, python, "gguf_file", checkpoint))
        _once(folder / STORE, partial(_pack, checkpoint))
        _once(fused, partial(fuse, checkpoint))
        _once(folder / OFFLOADED, partial(_by_peer, python, "offload_files", fused))


def file_bytes(folder: Path) -> int:
    """Of the GGUF file, which every share is of."""
    return (folder / GGUF).stat().st_size


def _once(out: Path, make: Callable[[Path], None]) -> None:
    """Every `make` publishes by renaming, so what is there is whole."""
    if not out.exists():
        print(f"making {out.name} ...", flush=True)
        make(out)


def _by_peer(python: Path, module: str, source: Path, out: Path) -> None:
    command = [str(python), "-m", f"tests.bench.peers.{module}", str(source), str(out)]
    subprocess.run(command, cwd=ROOT, check=True)


def _pack(source: Path, out: Path) -> None:
    packing = out.with_name(out.name + ".packing")
    command = [sys.executable, "-m", "deploy.cli", "pack", str(source), "--out", str(packing)]
    subprocess.run(command, cwd=ROOT, check=True)
    packing.rename(out)
