"""What the simulator of boxes is given to foretell `owned`: speeds measured apart from it, and the
routing of the same prompts on the shipped model.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.bench.boxes.answers import ask, prompts
from tests.bench.boxes.models import FOLDER, NUM_LAYERS, shipped_image, widened_image
from tests.bench.boxes.owned import PROMPTS, SHARE, TOKENS, TOP_K
from tests.boxlab.box import Box
from tests.boxlab.group import EDGE_SSD, Throttle
from tests.boxlab.laboratory import laboratory
from tests.boxlab.switch import GIGABIT
from tests.stack import MODEL

FAST = Throttle(2_000_000_000, 100_000)
ALL = ("--experts-memory", "100%")
PATH = FOLDER / "simulator_inputs.json"
ROUNDS = 3
_READ_MIB = 384


Routes = tuple[NDArray[np.uint16], NDArray[np.uint16]]
"""[T, L, K] of a prompt, and of the tokens of its answer that a step decodes with."""


@dataclass(frozen=True)
class Resident:
    """A token of one box, and of each of two at once that have nothing to do with one another."""

    alone_s: float
    shared_s: float
    token_ids: list[list[int]]

    @classmethod
    def measure(cls, image: Path) -> Resident:
        with laboratory([image] * 2, speed=FAST) as boxes, ExitStack() as stack:
            for box in boxes:
                stack.enter_context(box.main([], *ALL))
            token_ids = [[_ids(box, seed) for seed in (1, 2)] for box in boxes]  # reads them all
            assert token_ids[0] == token_ids[1]
            return cls(_token_s(boxes[:1]), _token_s(boxes), token_ids[0])


@dataclass(frozen=True)
class Inputs:
    """One thread a box

    disk_bytes_per_s: that a throttled disk gives, by what was asked of it
    small:     the shipped model, whose experts are next to nothing
    expert_s:  of an expert of 24 MiB, alone, and shared_expert_s, beside another box that does so
    message_s: what a layer takes longer with experts on another box, without the link
    serial_s:  and with each box more
    recall, precision: of what a main node names of misses, on another prompt
    prompts:   of the two answers
    """

    disk_bytes_per_s: dict[str, float]
    small: Resident
    expert_s: float
    shared_expert_s: float
    message_s: float
    serial_s: float
    recall: float
    precision: float
    prompts: list[list[int]]

    def save(self) -> None:
        PATH.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls) -> Inputs:
        """Raises FileNotFoundError before they were measured."""
        found = json.loads(PATH.read_text())
        return cls(**found | {"small": Resident(**found["small"])})

    @property
    def layer_s(self) -> float:
        """Of a layer, all resident, with experts that are next to nothing."""
        return self.small.alone_s / NUM_LAYERS


def measure(speeds: Sequence[Throttle] = (EDGE_SSD,)) -> Inputs:
    disks = {str(speed.bytes_per_s): _disk_bytes_per_s(speed) for speed in speeds}
    small = Resident.measure(shipped_image())
    return Inputs(
        disks,
        small,
        *expert_s(small),
        *messages(small),
        *foresight(),
        _prompts(),
    )


def routing(inputs: Inputs) -> list[Routes]:
    """Of each prompt and its answer."""
    return [
        _routes(prompt, answer)
        for prompt, answer in zip(inputs.prompts, inputs.small.token_ids, strict=True)
    ]


def _routes(prompt: list[int], answer: list[int]) -> Routes:
    """By transformers, on the shipped model."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    with torch.inference_mode():
        logits = model(ids, output_router_logits=True, use_cache=False).router_logits
    chosen = torch.stack([one.topk(TOP_K, dim=-1).indices for one in logits], dim=1)
    routes: NDArray[np.uint16] = chosen.numpy().astype(np.uint16)
    return routes[: len(prompt)], routes[len(prompt) :]


def _prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return [tokenizer(prompt).input_ids for prompt in PROMPTS]


def _disk_bytes_per_s(speed: Throttle) -> float:
    with laboratory([widened_image()] * 2, speed=speed) as (box, _):
        largest = max(box.store_dir.iterdir(), key=lambda path: path.stat().st_size)
        command = ["dd", f"if={largest}", "of=/dev/null", "bs=2M", f"count={_READ_MIB // 2}"]
        done = subprocess.run(
            box.command([*command, "iflag=direct"]), capture_output=True, text=True, check=True
        )
    return _READ_MIB * 2**20 / float(done.stderr.rsplit("copied, ", 1)[1].split()[0])


def expert_s(small: Resident) -> tuple[float, float]:
    """Of 24 MiB, alone and beside another box."""
    large, experts = Resident.measure(widened_image()), NUM_LAYERS * TOP_K
    assert small.token_ids == large.token_ids, "the widened model says something else"
    return (
        (large.alone_s - small.alone_s) / experts,
        (large.shared_s - small.shared_s) / experts,
    )


def _token_s(boxes: Sequence[Box]) -> float:
    gaps_s: list[float] = []
    for _ in range(ROUNDS):
        threads = [threading.Thread(target=_add_gaps, args=(box, gaps_s)) for box in boxes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return statistics.fmean(gaps_s)


def _ids(box: Box, seed: int) -> list[int]:
    with box.client() as client:
        return ask(client, PROMPTS[seed - 1], TOKENS, seed).token_ids


def _add_gaps(box: Box, gaps_s: list[float]) -> None:
    with box.client() as client:
        gaps_s += ask(client, PROMPTS[1], TOKENS, seed=2).gaps_s


def messages(small: Resident) -> tuple[float, float]:
    """What a layer takes longer, all resident, with one other box and with three, divided into what
    each message adds and the rest.
    """
    more_s, num_asked = zip(*(_with_workers(count, small.alone_s) for count in (1, 3)), strict=True)
    serial_s = max(0.0, (more_s[1] - more_s[0]) / (num_asked[1] - num_asked[0]))
    rest_s = more_s[0] - num_asked[0] * serial_s
    if rest_s < 0:  # boxes also spare the main one some computing
        return 0.0, more_s[1] / num_asked[1]
    return rest_s, serial_s


def _with_workers(count: int, small_s: float) -> tuple[float, float]:
    """What a layer takes longer with the shipped model and equal shares, and how many boxes it asks
    beside the main one.
    """
    with laboratory([shipped_image()] * (count + 1), speed=FAST) as boxes, ExitStack() as stack:
        main, *workers = boxes
        for box in workers:
            stack.enter_context(box.worker(*ALL))
        stack.enter_context(main.main(workers, *ALL))
        for seed in (1, 2):
            _ids(main, seed)
        gaps_s: list[float] = []
        num_before = _num_answered(main, workers)
        for _ in range(ROUNDS):
            _add_gaps(main, gaps_s)
        num_asked = _num_answered(main, workers) - num_before
    more_s = (statistics.fmean(gaps_s) - small_s) / NUM_LAYERS - GIGABIT.round_trip_s
    return more_s, num_asked / (ROUNDS * TOKENS * NUM_LAYERS)  # a kept prompt is one token, too


def _num_answered(main: Box, workers: Sequence[Box]) -> int:
    with main.client() as client:
        seen = client.stats()
    return sum(seen.of(box=box.address).answered for box in workers)


def foresight() -> tuple[float, float]:
    """Of one box with a fifth of the experts, by run-ahead: recall and precision of misses."""
    with laboratory([widened_image()] * 2, speed=EDGE_SSD) as (box, _), ExitStack() as stack:
        stack.enter_context(box.main([], "--experts-memory", SHARE))
        with box.client() as client:
            ask(client, prompts(4)[3], TOKENS, seed=3)
            seen = client.stats()
    precision = seen.guesses_right / (seen.guesses_right + seen.guesses_wrong)
    return seen.foreseen_misses / seen.decode_misses, precision


def rows(inputs: Inputs) -> dict[str, Any]:
    return {
        **{f"disk asked {asked}, MB/s": f / 1e6 for asked, f in inputs.disk_bytes_per_s.items()},
        "layer, ms": 1e3 * inputs.layer_s,
        "layer, two at once, ms": 1e3 * inputs.small.shared_s / NUM_LAYERS,
        "expert, ms": 1e3 * inputs.expert_s,
        "expert, two at once, ms": 1e3 * inputs.shared_expert_s,
        "message, ms": 1e3 * inputs.message_s,
        "each message more, ms": 1e3 * inputs.serial_s,
        "recall of misses": inputs.recall,
        "precision of misses": inputs.precision,
    }
