"""One run: an engine started cold under a limit, one prompt cold, ten warm, and what they cost."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import islice, pairwise
from pathlib import Path
from subprocess import SubprocessError
from typing import Protocol

from proto.errors import FlashMoEError
from tests.bench.peers.cgroup import MemoryGroup, memory_group
from tests.bench.peers.cpu import CpuMoment
from tests.bench.peers.disk import PeersDisk
from tests.bench.peers.engine import Engine, Setup, Start


@dataclass(frozen=True)
class Prompt:
    """name: its domain."""

    name: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """What is run.

    share:       of the model file, in percent; None: without a limit
    num_prompts: the cold one included
    """

    engine: str
    share: float | None
    limit_bytes: int | None
    read_ahead_bytes: int
    num_prompts: int
    max_tokens: int
    round_number: int


@dataclass(frozen=True)
class Answer:
    """What one prompt cost. latencies_s: of each token after the first.

    prefill_bytes, decode_bytes: read from the disk until the first token, and after it
    """

    prompt: str
    prompt_tokens: int
    token_ids: list[int]
    ttft_s: float
    latencies_s: list[float]
    prefill_bytes: int
    decode_bytes: int
    prefill_faults: int
    decode_faults: int

    @property
    def tokens_per_s(self) -> float:
        return len(self.latencies_s) / sum(self.latencies_s)


@dataclass(frozen=True)
class RunResult:
    """answers: the first was given cold. failure: why there are no more; None: there are all.

    others_ratio: share of all cores that was taken by others meanwhile
    """

    case: Case
    commit: str
    start_s: float
    peak_bytes: int
    answers: list[Answer] = field(default_factory=list)
    failure: str | None = None
    others_ratio: float = 0.0


GIVEN_UP = (OSError, HTTPException, SubprocessError, FlashMoEError)


class Counters(Protocol):
    """What is counted beside an engine."""

    def read(self) -> tuple[int, int]:
        """Bytes read from the disk, major faults of the engine's processes."""
        ...


@dataclass
class DiskAndGroup:
    """Of a run."""

    disk: PeersDisk
    group: MemoryGroup

    def read(self) -> tuple[int, int]:
        return self.disk.bytes_read, self.group.major_faults


def measure(
    case: Case,
    start: Start,
    disk: PeersDisk,
    python: Path,
    log: Path,
    prompts: Sequence[Prompt],
    commit: str,
) -> RunResult:
    """An engine that ends early, or is killed for memory, gives a failure and what came before."""
    answers: list[Answer] = []
    failure, others_ratio = None, 0.0
    with ExitStack() as stack:
        stack.enter_context(disk.mounted(case.read_ahead_bytes))
        group = stack.enter_context(memory_group(case.limit_bytes))
        began_s = time.monotonic()
        start_s = 0.0
        try:
            with start(Setup(python, disk.folder, group, case.limit_bytes, log)) as engine:
                start_s = time.monotonic() - began_s
                before = CpuMoment.now(group.pids)
                for number, prompt in enumerate(prompts[: case.num_prompts]):
                    seed = 1000 * case.round_number + number
                    counters = DiskAndGroup(disk, group)
                    answers.append(ask(engine, prompt, case.max_tokens, seed, counters))
                after = CpuMoment.now(group.pids)
                others_ratio = after.others_ratio(before, os.cpu_count() or 1)
        except GIVEN_UP as error:
            failure = "killed for memory" if group.num_killed else str(error)
        return RunResult(case, commit, start_s, group.peak_bytes, answers, failure, others_ratio)


def ask(engine: Engine, prompt: Prompt, max_tokens: int, seed: int, counters: Counters) -> Answer:
    """Raises OSError when the engine gives up before its last token."""
    before = counters.read()
    asked_s = time.monotonic()
    tokens = engine.generate(prompt.token_ids, max_tokens, seed)
    came = list(islice(tokens, 1))
    between = counters.read()
    came += tokens
    after = counters.read()
    if len(came) != max_tokens:
        raise OSError(f"{len(came)} tokens came of {max_tokens}")
    return Answer(
        prompt=prompt.name,
        prompt_tokens=len(prompt.token_ids),
        token_ids=[token.token_id for token in came],
        ttft_s=came[0].at_s - asked_s,
        latencies_s=[b.at_s - a.at_s for a, b in pairwise(came)],
        prefill_bytes=between[0] - before[0],
        decode_bytes=after[0] - between[0],
        prefill_faults=between[1] - before[1],
        decode_faults=after[1] - between[1],
    )
