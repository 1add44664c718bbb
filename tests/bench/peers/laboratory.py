"""Where runs are made: the peers' environment, a disk, results on file."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from tests.bench.peers import results
from tests.bench.peers.contenders import CONTENDERS
from tests.bench.peers.disk import PeersDisk, own_read_ahead_bytes
from tests.bench.peers.models import PeerModel, file_bytes
from tests.bench.peers.run import Case, Prompt, RunResult, measure
from tests.bench.widen import MIB
from tests.stack import MODEL, ROOT

FOLDER = ROOT / ".flashmoe/peers"
PROMPTS = ROOT / "tests/bench/prompts"
KIB = 1024


@dataclass(frozen=True)
class Laboratory:
    """name: of its results. python: of the peers' environment. disk_name: None: as the results."""

    name: str
    model: PeerModel
    python: Path
    commit: str
    disk_name: str | None = None

    @property
    def disk(self) -> PeersDisk:
        return PeersDisk(FOLDER / f"{self.disk_name or self.name}.img", FOLDER / "disk")

    def prepare(self) -> int:
        """Make the model on its disk, unless it is there. Returns the bytes of the model file.

        Raises OSError, CalledProcessError.
        """
        if not self.disk.exists:
            free = shutil.disk_usage(FOLDER).free
            print(
                f"making the model: needs {self.model.disk_bytes / MIB:,.0f} MiB below {FOLDER}"
                f" ({free / MIB:,.0f} MiB are free), and minutes"
            )
            self.disk.create(self.model.disk_bytes)
        with self.disk.mounted(own_read_ahead_bytes(FOLDER)) as folder:
            self.model.make(folder, self.python)
            return file_bytes(folder)

    def discard(self) -> None:
        """The disk with the model. Results stay."""
        self.disk.delete()

    def log(self, engine: str) -> Path:
        return FOLDER / f"{engine}.log"

    def run(self, wanted: Sequence[Case], prompts: Sequence[Prompt]) -> list[RunResult]:
        """Of all `wanted`: those of this commit that are on file, and the others made now."""
        left = self.missing(wanted)
        print(f"{len(left)} of {len(wanted)} runs to make, some minutes each", flush=True)
        for number, case in enumerate(left, 1):
            print(f"{number}: {_describe(case)} ...", flush=True)
            start, log = CONTENDERS[case.engine].start, self.log(case.engine)
            made = measure(case, start, self.disk, self.python, log, prompts, self.commit)
            results.append(self._file, made)
        chosen = set(wanted)
        return [run for run in self._on_file() if run.case in chosen]

    def missing(self, wanted: Sequence[Case]) -> list[Case]:
        """Those that are not on file yet."""
        done = {run.case for run in self._on_file()}
        return [case for case in wanted if case not in done]

    def forget(self) -> None:
        """Earlier runs."""
        self._file.unlink(missing_ok=True)

    @property
    def _file(self) -> Path:
        return FOLDER / f"{self.name}.jsonl"

    def _on_file(self) -> list[RunResult]:
        """Of this commit: figures of two do not belong in one table."""
        return [run for run in results.load(self._file) if run.commit == self.commit]


def read_prompts(num_tokens: int) -> list[Prompt]:
    """The beginnings of eleven texts of different domains."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    return [
        Prompt(file.stem, tuple(tokenizer.encode(file.read_text()).ids[:num_tokens]))
        for file in sorted(PROMPTS.glob("*.txt"))
    ]


def present_commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _describe(case: Case) -> str:
    limit = "no limit"
    if case.limit_bytes is not None:
        limit = f"{case.limit_bytes // MIB} MiB"
    ahead = f"read-ahead {case.read_ahead_bytes // KIB} KiB"
    return f"round {case.round_number}, {case.engine}, {limit}, {ahead}"
