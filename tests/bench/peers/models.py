"""The model compared, in the format of every engine, on the peers' disk: made once, then kept."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench.peers.fused import fuse
from tests.bench.widen import MIB, widen
from tests.stack import MODEL, ROOT

CHECKPOINT, GGUF, STORE = "checkpoint", "model.gguf", "store"
LOSSLESS = "lossless"  # the same experts, packed so
VARIANTS = "variants"  # the same experts, and a small record of each
FUSED, OFFLOADED = "fused", "offloaded"
ALL_FORMATS = (GGUF, STORE, LOSSLESS, VARIANTS, FUSED, OFFLOADED)
_ROOM = 1.06  # for the file system, and what is not in experts
_SMALL_SHARE = 0.4  # of a record, at most, that a small one takes
_NARROW_EXPERTS = 8 * 32  # of the shipped model


@dataclass(frozen=True)
class PeerModel:
    """The shipped model, its experts padded to `record_bytes` and copied.

    formats: what is made of it, beside the checkpoint, which becomes FUSED or is deleted
    """

    record_bytes: int
    copies: int = 1
    formats: tuple[str, ...] = ALL_FORMATS

    @property
    def disk_bytes(self) -> int:
        """Of a disk that has room for every format, and the checkpoint meanwhile."""
        count = len({*self.formats, FUSED}) + (VARIANTS in self.formats) * _SMALL_SHARE
        experts_bytes = self.record_bytes * self.copies * _NARROW_EXPERTS
        return int(count * experts_bytes * _ROOM) + 256 * MIB

    def make(self, folder: Path, python: Path) -> None:
        """What is not there yet. python: of the peers' environment.

        Raises OSError, or CalledProcessError when a command fails.
        """
        if all((folder / name).exists() for name in self.formats):
            return
        checkpoint, fused = folder / CHECKPOINT, folder / FUSED
        if not fused.exists():
            _once(checkpoint, lambda out: widen(MODEL, out, self.record_bytes, self.copies))
        makers: dict[str, Callable[[Path], None]] = {
            GGUF: partial(_by_peer, python, "gguf_file", checkpoint),
            STORE: partial(_pack, checkpoint, ["--format", "exact"]),
            LOSSLESS: partial(_pack, checkpoint, ["--format", "lossless"]),
            VARIANTS: partial(_pack, checkpoint, ["--variants", "exact,int4"]),
            FUSED: partial(fuse, checkpoint),  # comes last of what needs the checkpoint
            OFFLOADED: partial(_by_peer, python, "offload_files", fused),
        }
        for name, make in makers.items():
            if name in self.formats:
                _once(folder / name, make)
        shutil.rmtree(checkpoint, ignore_errors=True)


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


def _pack(source: Path, options: Sequence[str], out: Path) -> None:
    packing = out.with_name(out.name + ".packing")
    command = [sys.executable, "-m", "deploy.cli", "pack", str(source), "--out", str(packing)]
    subprocess.run([*command, *options], cwd=ROOT, check=True)
    packing.rename(out)
