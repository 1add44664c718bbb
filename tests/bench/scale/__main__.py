"""A model that an 8 GB laptop cannot hold, on routing recorded from a real one, by policy.

    python -m tests.bench.scale TRACE.npz [--quick]

gpt-oss-20b's geometry in int4 with random weights, served from a real store on disk by a real
expert_store, computed by the node's own code. Needs 11 GB of disk for a while.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from compute_node.native import binding
from deploy.plan.budget import MemoryPlan, plan_memory
from deploy.plan.room import check_shared_memory
from deploy.settings import ServeSettings, parse_bytes
from deploy.verbs.calibrate import check_trace
from expert_store.manifest.manifest import MANIFEST_NAME, Manifest
from proto import errors
from scheduler.learn.forecaster import Forecaster
from scheduler.simulate.trace import AccessTrace
from tests.bench.policies import splits
from tests.bench.scale.advice import told_by, trained
from tests.bench.scale.node import Node, Run
from tests.bench.scale.random_store import GPT_OSS_20B, NoRoom, file_system, make
from tests.bench.scale.report import Cell, Results, print_checks, print_table
from tests.bench.scale.segments import Segment, ranking, replayed_hits, segments
from tests.bench.table import machine
from tests.daemons import daemon, store_table

LOCAL = ("lru", "lfru", "decayed")
FRAME = ("lfu", "min")  # replayed alone, for their hits
MEMORY_DISKS = ("tmpfs", "ramfs")


@dataclass
class Bench:
    """What all runs share."""

    node: Node
    store_dir: Path
    plans: dict[str, MemoryPlan]
    run_dir: Path
    forecaster: Forecaster | None
    fresh_steps: int
    results: Results = field(default_factory=Results)

    def round(self, number: int, segment: Segment) -> None:
        """Every policy at every ceiling over one segment, who begins takes turns."""
        told = told_by(segment.trace, self.forecaster)
        self.results.advice_us = {name: one.us_per_step for name, one in told.items()}
        names = [*LOCAL, *told]
        names = names[number % len(names) :] + names[: number % len(names)]
        if self.fresh_steps and number == 0:
            self.results.fresh = self.node.fresh(segment, self.fresh_steps)
        for memory, plan in self.plans.items():
            for name in (*names, *FRAME):
                hits = replayed_hits(*ranking(name, segment, told), segment, plan.slots)
                self.results.replayed[Cell(memory, name, number)] = hits
            # Its name is the segment's too: no other run's may be the same.
            run = self.run_dir / f"{self.run_dir.name[-8:]}-{number}-{memory}"
            run.mkdir()
            table = store_table(
                self.store_dir,
                run,
                plan.slots + plan.spare_slots,
                spare_slots=plan.spare_slots,
            )
            with daemon("expert_store", run, table) as store:
                pid = store.process.pid
                for name in names:
                    found = self.node.run(segment, name, told.get(name), plan.slots, run, pid)
                    self._keep(Cell(memory, name, number), found, pid)

    def _keep(self, cell: Cell, found: Run, store_pid: int) -> None:
        self.results.runs[cell] = found
        processes = psutil.Process(), psutil.Process(store_pid)
        pss_bytes = sum(process.memory_full_info().pss for process in processes)
        known = self.results.pss_bytes.get(cell.memory, 0)
        self.results.pss_bytes[cell.memory] = max(known, pss_bytes)
        speed = f"{found.tokens_per_s:.2f} tokens/s, others' CPU {found.others_ratio:.0%}"
        print(
            f"round {cell.round_number + 1}, {cell.memory}, {cell.policy}: {speed}", file=sys.stderr
        )


def main() -> None:
    """SIGTERM removes what was made, like the end of the program."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    given = _arguments()
    try:
        results = _measure(given)
    except NoRoom as error:
        print(f"skipped: {error}")
        return
    except (OSError, errors.FlashMoEError) as error:
        sys.exit(f"scale: {error}")
    if not print_checks(results):
        sys.exit("scale: a check failed, no figure above counts")


def _measure(given: argparse.Namespace) -> Results:
    trace = AccessTrace.load(given.trace)
    train, test = splits(trace, 1)[0]
    chosen = segments(test, given.rounds, given.warmup, given.steps)
    torch.set_num_threads(given.threads)
    print(_machine(given.threads))
    with _folders(given.keep) as (store_dir, run_dir):
        manifest = _store(store_dir)
        check_trace(trace, manifest)
        plans = _plans(manifest, given.memory.split(","))
        forecaster = trained(train, manifest, store_dir) if given.learned else None
        began_s = time.perf_counter()
        bench = Bench(
            Node(store_dir, manifest), store_dir, plans, run_dir, forecaster, given.fresh_steps
        )
        try:
            for number, segment in enumerate(chosen):
                bench.round(number, segment)
        finally:  # what a stopped run has measured is shown
            elapsed_s = round(time.perf_counter() - began_s)
            print_table(bench.results, plans, manifest, chosen, trace.name, elapsed_s)
    return bench.results


def _machine(num_threads: int) -> str:
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return (
        f"commit {commit}, {machine()}, torch {torch.__version__}, {num_threads} threads, "
        f"matrix kernel: {binding.in_charge()}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("trace", type=Path, help="of gpt-oss-20b: 24 layers x 32 experts, top 4")
    parser.add_argument("--quick", action="store_true", help="one ceiling, one short round")
    parser.add_argument("--memory", help="ceilings, as `serve --memory`; default: 4GiB,6GiB,7GiB")
    parser.add_argument("--rounds", type=int, help="segments of other generations; default: 3")
    parser.add_argument("--steps", type=int, help="counted, of each round; default: 24")
    parser.add_argument("--warmup", type=int, default=500, help="steps before; default: 500")
    parser.add_argument("--fresh-steps", type=int, default=3, help="compared with no cache")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--learned", action="store_true", help="calibrate first: minutes")
    parser.add_argument("--keep", type=Path, metavar="STORE", help="made there if need be, kept")
    given = parser.parse_args()
    given.memory = given.memory or ("7GiB" if given.quick else "4GiB,6GiB,7GiB")
    given.rounds = given.rounds or (1 if given.quick else 3)
    given.steps = given.steps or (16 if given.quick else 24)
    return given


@contextmanager
def _folders(keep: Path | None) -> Iterator[tuple[Path, Path]]:
    """Where the store is or will be, and a folder that goes at the end."""
    with tempfile.TemporaryDirectory(prefix="fm-bench-", dir=Path.cwd()) as scratch:
        yield (keep or Path(scratch) / "store").resolve(), Path(scratch)


def _store(store_dir: Path) -> Manifest:
    """As it was kept, or made. Raises NoRoom, OSError when other files are in the way."""
    if (store_dir / MANIFEST_NAME).exists():
        return Manifest.load(store_dir)
    kind = file_system(store_dir.parent)
    if kind in MEMORY_DISKS:
        raise NoRoom(f"{store_dir.parent} is {kind}, which is memory: run it in a folder on a disk")
    partial = store_dir.with_name(store_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run
    began_s = time.perf_counter()
    try:
        make(partial, GPT_OSS_20B)
    except BaseException:
        shutil.rmtree(partial)
        raise
    partial.rename(store_dir)
    print(f"store made in {time.perf_counter() - began_s:.0f} s", file=sys.stderr)
    return Manifest.load(store_dir)


def _plans(manifest: Manifest, ceilings: list[str]) -> dict[str, MemoryPlan]:
    """What `flashmoe serve --memory` would plan; a ceiling that it refuses is said and left out."""
    settings, plans = ServeSettings(), {}
    for memory in ceilings:
        try:
            plans[memory] = plan_memory(
                manifest,
                parse_bytes(memory, "--memory"),
                None,
                context_tokens=settings.context_tokens,
                chunk_tokens=settings.chunk_tokens(manifest.sizing),
                spare_bytes=settings.spare_slots(manifest.slot_bytes) * manifest.slot_bytes,
            )
            check_shared_memory(plans[memory])
        except errors.MemoryExceeded as error:
            print(f"{memory}: {error}\n")
    return plans


if __name__ == "__main__":
    main()
