"""Tokens/s of a main node with a worker whose experts come from the main box's store, beside one
with a store of its own.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack

from proto import rpc
from proto import stats_pb2 as stats_pb
from proto.stats import Stats
from proto.worker_pb2_grpc import WorkerStub
from tests.bench.boxes.answers import ask, prompts
from tests.bench.boxes.models import NUM_EXPERTS, shipped_image
from tests.bench.table import show, spread
from tests.boxlab.box import Box
from tests.boxlab.laboratory import laboratory
from tests.boxlab.switch import FAST_ETHERNET, GIGABIT
from tests.stack import wait_for

LINKS = {"1 Gbit/s, .3 ms": GIGABIT, "100 Mbit/s, .3 ms": FAST_ETHERNET}
STORES, SHARES = ("own", "main's"), ("100%", "25%")
EXPERT_KIB = 36 * 1024 / NUM_EXPERTS
TOKENS, ROUNDS = 49, 2


def main() -> None:
    speeds, missed = defaultdict[tuple[str, ...], list[float]](list), dict[tuple[str, ...], float]()
    texts = defaultdict[int, set[tuple[int, ...]]](set)
    for share in SHARES:
        for which in STORES:
            with laboratory([shipped_image()] * 2) as (box, worker), ExitStack() as stack:
                start(stack, box, worker, which, share)
                client = stack.enter_context(box.client())
                for name, link in LINKS.items():
                    for one in (box, worker):
                        one.switch.set(one.name, link)
                    before = misses(worker)
                    for number in range(-3, 3 * ROUNDS):  # the first three are cold
                        answer = ask(client, prompts(3)[number % 3], TOKENS, seed=number % 3)
                        texts[number % 3].add(tuple(answer.token_ids))
                        if number >= 0:
                            speeds[share, which, name].append(answer.tokens_per_s)
                    tokens = 3 * (ROUNDS + 1) * TOKENS
                    missed[share, which, name] = (misses(worker) - before) / tokens
                    print(share, which, name, speeds[share, which, name], flush=True)
    assert all(len(found) == 1 for found in texts.values()), "another text"
    show(
        f"The shipped model, a main node and one worker, three domains, {TOKENS} tokens each, "
        f"{ROUNDS} rounds; all the same tokens",
        ["in memory of each", "worker's store", "link", "tokens/s", "KiB a token it took"],
        [
            [*key, spread(found, 1), f"{missed[key] * EXPERT_KIB:.0f}"]
            for key, found in speeds.items()
        ],
    )


def start(stack: ExitStack, box: Box, worker: Box, which: str, share: str) -> None:
    flags = ("--experts-memory", share)
    if which == "own":
        stack.enter_context(worker.worker(*flags))
        stack.enter_context(box.main([worker], *flags))
    else:  # it waits for the store, and the main node not for long for the worker
        stack.enter_context(box.main([worker], *flags, "--lend", box.at_store))
        stack.enter_context(worker.borrower(box, *flags))
    with box.client() as client:
        wait_for(lambda: client.stats().of(box=worker.address).up, 60, "the worker to join")


def misses(worker: Box) -> int:
    with rpc.connect(worker.run.address("worker")) as channel:
        stats = Stats.from_pb(WorkerStub(channel).Stats(stats_pb.StatsRequest(), timeout=10))
    return int(stats.misses)
