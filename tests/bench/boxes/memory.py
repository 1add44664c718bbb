"""What a worker takes beside its slots, at rest and after work, against what is planned for it.

It is measured while no main node runs: processes that map the same libraries would share them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil

from deploy.plan.parts import OVERHEAD_BYTES
from tests.bench.boxes.answers import ask, prompts
from tests.bench.boxes.models import shipped_image, widened_image
from tests.bench.table import show
from tests.boxlab.laboratory import laboratory
from tests.stack import ServedStack

MIB = 1024 * 1024
NAMES = {"expert_store": "expert_store", "compute_node.worker": "worker"}


def main() -> None:
    rows = []
    for name, image, share, tokens in (
        ("shipped", shipped_image(), "50%", 65),
        ("24 MiB", widened_image(), "20%", 9),
    ):
        with laboratory([image] * 2) as (main_box, box), ExitStack() as stack:
            worker = stack.enter_context(box.worker("--experts-memory", share))
            rows += _rows(f"{name}, at rest", worker)
            with (
                main_box.main([box], "--experts-memory", share),
                main_box.client() as client,
            ):
                for number, prompt in enumerate(prompts(2)):
                    ask(client, prompt, tokens, number)
            rows += _rows(f"{name}, after a prompt and decode", worker)
    header = ["model", "process", "PSS beside slots, MiB", "of slots, MiB", "planned, MiB"]
    show("A worker's memory", header, rows)


def _rows(label: str, stack: ServedStack) -> Iterator[list[str]]:
    pids = {"launcher": stack.process.pid, **{ours: stack.pid(n) for n, ours in NAMES.items()}}
    for name, pid in pids.items():
        assert psutil.pid_exists(pid)
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        pss = {line.split()[0]: int(line.split()[1]) / 1024 for line in lines}
        beside = pss["Pss_Anon:"] + pss["Pss_File:"]
        planned = OVERHEAD_BYTES[name] // MIB
        yield [label, name, f"{beside:.0f}", f"{pss['Pss_Shmem:']:.0f}", str(planned)]
