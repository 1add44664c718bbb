"""Groups of workers take layers in turn and read what a shadow in int4 names: tokens/s over what
the formula of `flashmoe plan` (deploy/plan/rotation.py) says, and over one box that holds all, by
groups and slots, experts of 24 MiB. The formula takes what computing costs as measured beside a
shadow that follows: here all boxes share two cores.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from deploy.plan.rotation import Rotation
from proto import rpc
from proto import stats_pb2 as stats_pb
from proto.shadow_pb2_grpc import ShadowStub
from proto.stats import Stats
from tests.bench.boxes.answers import Answer, ask
from tests.bench.boxes.models import (
    NUM_EXPERTS,
    NUM_LAYERS,
    RECORD_BYTES,
    widened_image,
    widened_int4_image,
)
from tests.bench.table import show
from tests.boxlab.box import Box
from tests.boxlab.group import EDGE_SSD, Throttle
from tests.boxlab.laboratory import laboratory

PROMPTS = ("In the beginning God", "The file is not")
TOKENS, TOP_K, ROUNDS = 25, 4, 3
SLOTS = (2 * TOP_K, NUM_EXPERTS // 12)  # a worker's: two layers', and a twelfth of the experts
FAST = Throttle(2_000_000_000, 100_000)
GROUPS = (1, 2, 4)
TOKEN_BYTES = NUM_LAYERS * TOP_K * RECORD_BYTES
LINK_S = 0.0003
NODE = 'placement = "rotation"\n'


@dataclass(frozen=True)
class Run:
    """token_s: of decode; read_bytes: a token, of all workers; in_time: of the experts used, that
    were named before; right: guessed tokens that came
    """

    token_s: float
    read_bytes: float
    recall: float
    in_time: float
    right: float
    answer: Answer


def main() -> None:
    alone_s, resident = _alone_s(), _resident()
    print(f"resident, one box: {1e3 * alone_s:.0f} ms a token", flush=True)
    print(f"resident, one worker, a shadow: {1e3 * resident.token_s:.0f} ms a token", flush=True)
    rows, tokens = [], {tuple(resident.answer.token_ids)}
    for slots in SLOTS:
        for num_groups in GROUPS:
            run = _run(num_groups, slots)
            tokens.add(tuple(run.answer.token_ids))
            said_s = _said_s(_formula(resident, slots), num_groups, run)
            rows.append(
                [
                    str(slots),
                    str(num_groups),
                    f"{1 / run.token_s:.3f}",
                    f"{1 / said_s:.3f}",
                    f"{said_s / run.token_s:.2f}",
                    f"{alone_s / run.token_s:.2f}",
                    f"{num_groups * EDGE_SSD.bytes_per_s / TOKEN_BYTES:.3f}",
                    f"{run.read_bytes / 2**20:.0f}",
                    f"{run.recall:.3f}",
                    f"{run.in_time:.2f}",
                    f"{run.right:.2f}",
                ]
            )
            print(rows[-1], flush=True)
    assert len(tokens) == 1, "other tokens"
    show(
        "A rotation of workers with disks of 200 MB/s, and a shadow in int4; tokens/s when one box "
        f"holds all {1 / alone_s:.2f}, one worker {1 / resident.token_s:.2f}; formula: with the "
        "misses that there were",
        ["slots a worker", "groups", "tokens/s", "formula", "over formula", "over one box",
         "if all were read",
         "MiB read a token", "recall", "in time", "next token right"],
        rows,
    )  # fmt: skip


def _said_s(formula: Rotation, num_groups: int, run: Run) -> float:
    """Of a token, with the misses and the right guesses that were measured."""
    miss_ratio = run.read_bytes / TOKEN_BYTES
    known_s, unknown_s = (
        formula.seconds_with_hits(num_groups, miss_ratio, one) for one in (True, False)
    )
    return run.right * known_s + (1 - run.right) * unknown_s


def _formula(resident: Run, slots: int) -> Rotation:
    """A layer's time is divided evenly between main node and worker."""
    layer_s = resident.token_s / NUM_LAYERS
    return Rotation(
        NUM_LAYERS,
        TOP_K,
        RECORD_BYTES,
        EDGE_SSD.bytes_per_s,
        dense_s=layer_s / 2 - LINK_S,
        expert_s=layer_s / 2 / TOP_K,
        link_s=LINK_S,
        named_s=layer_s,
        token_s=0.0,
        slots=slots,
    )


def _alone_s() -> float:
    """Of a token, on a box that holds all."""
    with laboratory([widened_image()], speed=FAST) as (box,), ExitStack() as stack:
        stack.enter_context(box.main([], "--experts-memory", "100%"))
        client = stack.enter_context(box.client())
        for seed, prompt in enumerate(PROMPTS, start=1):
            ask(client, prompt, TOKENS, seed)
        answers = [ask(client, PROMPTS[1], TOKENS, seed=2) for _ in range(ROUNDS)]
        return 1 / statistics.median(answer.tokens_per_s for answer in answers)


def _resident() -> Run:
    """One worker that holds all experts, and a shadow."""
    images = [widened_image()] * 2 + [widened_int4_image()]
    with laboratory(images, speed=FAST) as (main, worker, shadow), ExitStack() as stack:
        stack.enter_context(worker.worker("--experts-memory", "100%"))
        stack.enter_context(shadow.shadow("--experts-memory", "100%"))
        flags = ("--experts-memory", "12.5%", "--shadow", shadow.address)
        stack.enter_context(main.main([worker], *flags, node=NODE))
        client = stack.enter_context(main.client())
        for seed, prompt in enumerate(PROMPTS, start=1):  # reads most, and keeps the prompt
            ask(client, prompt, TOKENS, seed)
        answers = [ask(client, PROMPTS[1], TOKENS, seed=2) for _ in range(ROUNDS)]
        token_s = 1 / statistics.median(answer.tokens_per_s for answer in answers)
        return Run(token_s, 0.0, 1.0, 1.0, 1.0, answers[0])


def _run(num_groups: int, slots: int) -> Run:
    images = [widened_image()] * (num_groups + 1) + [widened_int4_image()]
    with laboratory(images, speed=EDGE_SSD) as boxes, ExitStack() as stack:
        main, *workers, shadow = boxes
        shadow.group.throttle(FAST)
        for box in workers:
            stack.enter_context(box.worker("--experts-memory", str(slots)))
        stack.enter_context(shadow.shadow("--experts-memory", "100%"))
        flags = ("--experts-memory", "12.5%", "--shadow", shadow.address)
        stack.enter_context(main.main(workers, *flags, node=NODE))
        client = stack.enter_context(main.client())
        figures = list[tuple[int, ...]]()

        def look() -> None:
            figures.append((*_figures(workers, shadow), main.disk.bytes_read))

        ask(client, PROMPTS[1], TOKENS, seed=2)
        answer = ask(client, PROMPTS[1], TOKENS, seed=2, on_first=look)
        look()
        read, followed, right, own = (b - a for a, b in zip(*figures, strict=True))
        print(f"{num_groups} groups: the main node's disk read {own / 2**20:.0f} MiB", flush=True)
        seen = client.stats().of(shadow=shadow.address)
        return Run(
            1 / answer.tokens_per_s,
            read / (TOKENS - 1),
            seen.recall,
            seen.named / max(1, seen.named + seen.unheard),
            right / max(1, followed),
            answer,
        )


def _figures(workers: Sequence[Box], shadow: Box) -> tuple[int, int, int]:
    """Bytes read by workers, tokens that a shadow followed, and those that it had guessed."""
    with rpc.connect(shadow.run.address("shadow")) as channel:
        stats = Stats.from_pb(ShadowStub(channel).Stats(stats_pb.StatsRequest(), timeout=10))
    read = sum(box.disk.bytes_read for box in workers)
    return read, stats.followed, stats.guessed_right
