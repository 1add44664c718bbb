"""The longest time between two tokens around a worker's death, and around a partition."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise

from tests.bench.boxes.answers import prompts
from tests.bench.boxes.models import shipped_image
from tests.bench.table import percentile, show
from tests.boxlab.box import Box
from tests.boxlab.laboratory import laboratory
from tests.stack import ServedStack, wait_for

KILLS, CUTS, TOKENS, FAULT_AT = 20, 10, 96, 32
MEMORY = ("--experts-memory", "50%")


def main() -> None:
    """A killed worker's launcher stands still until the text is there: to start it anew takes
    processors, which boxes do not share elsewhere.
    """
    with laboratory([shipped_image()] * 3) as (main_box, *boxes), ExitStack() as stack:
        stacks = [stack.enter_context(box.worker(*MEMORY)) for box in boxes]
        stack.enter_context(main_box.main(boxes, *MEMORY))
        gaps_s: dict[str, list[float]] = {"none": [], "killed": [], "cut off": []}
        tokens = set[tuple[int, ...]]()
        for number in range(KILLS + CUTS):
            _wait_up(main_box, boxes)
            which = number % 2
            box, launcher = boxes[which], stacks[which]
            for name, fault in _faults(number, box, launcher).items():
                found, gap_s = _generate(main_box, fault)
                gaps_s[name].append(gap_s)
                print(f"{number} {name}: {gap_s:.3f} s", flush=True)
                tokens.add(tuple(found))
            box.heal()
        assert len(tokens) == 1, "another text"
    show(
        f"Longest gap between two of {TOKENS} tokens, shipped model, a main node and two workers",
        ["fault", "count", "p50 s", "p95 s", "most s"],
        [
            [
                name,
                len(found),
                *(f"{percentile(found, p):.3f}" for p in (0.5, 0.95)),
                f"{max(found):.3f}",
            ]
            for name, found in gaps_s.items()
        ],
    )


def _faults(number: int, box: Box, stack: ServedStack) -> dict[str, Callable[[], None]]:
    def kill() -> None:
        stack.launcher.send_signal(signal.SIGSTOP)
        stack.kill("compute_node.worker")

    if number < KILLS:
        return {"none": lambda: None, "killed": kill}
    return {"cut off": box.cut_off}


def _generate(box: Box, fault: Callable[[], None]) -> tuple[list[int], float]:
    tokens, came_s = [], []
    with box.client() as client:
        for piece in client.generate(
            prompts(1)[0], max_tokens=TOKENS, ignore_eos=True, timeout_s=100
        ):
            tokens.append(piece.token_id)
            came_s.append(time.monotonic())
            if len(tokens) == FAULT_AT:
                fault()
    return tokens, max(b - a for a, b in pairwise(came_s))


def _wait_up(main_box: Box, boxes: list[Box]) -> None:
    def all_up() -> bool:
        with main_box.client() as client:
            stats = client.stats()
        return all(stats.of(box=box.address).up for box in boxes)

    wait_for(all_up, 90, "workers to be up")
