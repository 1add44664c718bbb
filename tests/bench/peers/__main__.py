"""`make bench-peers`: the same weights under the same memory limit, in FlashMoE and in others.

Runs are kept as they end: called again at the same commit, it goes on where it stopped, unless
--fresh.
"""

from __future__ import annotations

import argparse
import fcntl
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from tests.bench.peers import cgroup, disk, results
from tests.bench.peers.contenders import CONTENDERS
from tests.bench.peers.disk import PeersDisk, own_read_ahead_bytes
from tests.bench.peers.models import PeerModel, file_bytes
from tests.bench.peers.plan import KIB, SHARES, cases
from tests.bench.peers.report import print_table
from tests.bench.peers.run import Case, Prompt, measure
from tests.bench.table import machine
from tests.bench.widen import MIB
from tests.stack import MODEL, ROOT

FOLDER = ROOT / ".flashmoe/peers"
PROMPTS = ROOT / "tests/bench/prompts"
PROMPT_TOKENS = 48
QUICK_PROMPTS = 4
MINUTES_A_RUN = 3  # on the machine that README's figures are of


def main() -> None:
    """SIGTERM unmounts and ends what runs, like the end of the program."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    chosen = _arguments()
    reason = cgroup.why_not() or disk.why_not()
    if reason:
        print(f"skipped: {reason}")
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"bench-peers: another comparison runs in {FOLDER}")
        compare(chosen)


def compare(chosen: argparse.Namespace) -> None:
    """Make what is missing, run what was not run yet, print the tables."""
    model = PeerModel(int(chosen.record_mib * MIB))
    peers_disk = PeersDisk(FOLDER / "disk.img", FOLDER / "disk")
    file = FOLDER / "results.jsonl"
    if chosen.fresh:
        file.unlink(missing_ok=True)
    _announce(model, peers_disk)
    size = _prepare(model, peers_disk, chosen.python)
    commit, prompts = _commit(), _prompts()
    wanted = list(_wanted(chosen, size, len(prompts)))
    done = {run.case for run in results.load(file) if run.commit == commit}
    left = [case for case in wanted if case not in done]
    print(f"{len(left)} of {len(wanted)} runs to make, about {MINUTES_A_RUN} minutes each")
    for case in left:
        print(f"round {case.round_number}: {case.engine}, {_limit(case)} ...", flush=True)
        start = CONTENDERS[case.engine].start
        log = FOLDER / f"{case.engine}.log"
        results.append(file, measure(case, start, peers_disk, chosen.python, log, prompts, commit))
    print(f"\ncommit {commit}, {machine()}, model file {size / MIB:,.0f} MiB\n")
    runs = [run for run in results.load(file) if run.commit == commit and run.case in wanted]
    print_table(runs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="of the peers' environment")
    parser.add_argument("--record-mib", type=float, default=24.0, help="MiB an expert")
    parser.add_argument("--engines", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--shares", help="percent of the model file, or none for no limit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of four prompts")
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs")
    return parser.parse_args()


def _wanted(chosen: argparse.Namespace, size_bytes: int, num_prompts: int) -> Iterator[Case]:
    contenders = {name: one for name, one in CONTENDERS.items() if one.by_default}
    if chosen.engines:
        contenders = {name: CONTENDERS[name] for name in chosen.engines.split(",")}
    shares: Sequence[float | None] = SHARES
    if chosen.shares:
        shares = [None if s == "none" else float(s) for s in chosen.shares.split(",")]
    return cases(
        contenders,
        shares,
        size_bytes,
        own_read_ahead_bytes(ROOT),
        QUICK_PROMPTS if chosen.quick else num_prompts,
        1 if chosen.quick else chosen.rounds,
    )


def _limit(case: Case) -> str:
    ahead = f"read-ahead {case.read_ahead_bytes // KIB} KiB"
    if case.limit_bytes is None:
        return f"no limit, {ahead}"
    return f"{case.share:g} % = {case.limit_bytes // MIB} MiB, {ahead}"


def _announce(model: PeerModel, peers_disk: PeersDisk) -> None:
    if not peers_disk.exists:
        free = shutil.disk_usage(ROOT).free
        print(
            f"needs {model.disk_bytes / MIB:,.0f} MiB below {FOLDER} (free: {free / MIB:,.0f} MiB) "
            "and some ten minutes to make the model"
        )


def _prepare(model: PeerModel, peers_disk: PeersDisk, python: Path) -> int:
    """The model on its disk. Returns the bytes of the model file."""
    try:
        if not peers_disk.exists:
            peers_disk.create(model.disk_bytes)
        with peers_disk.mounted(own_read_ahead_bytes(ROOT)):
            model.make(peers_disk.folder, python)
            return file_bytes(peers_disk.folder)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"bench-peers: {error}")


def _prompts() -> list[Prompt]:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    return [
        Prompt(file.stem, tuple(tokenizer.encode(file.read_text()).ids[:PROMPT_TOKENS]))
        for file in sorted(PROMPTS.glob("*.txt"))
    ]


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
