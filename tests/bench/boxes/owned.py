"""Tokens/s of one box and of several, each with a disk of 200 MB/s and a fifth of the experts in
memory, on experts of 24 MiB.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from proto import rpc
from proto import stats_pb2 as stats_pb
from proto.stats import Stats
from proto.worker_pb2_grpc import WorkerStub
from tests.bench.boxes.answers import Answer, ask
from tests.bench.boxes.models import NUM_LAYERS, RECORD_BYTES, widened_image
from tests.bench.table import show, spread
from tests.boxlab.box import Box
from tests.boxlab.group import EDGE_SSD, Throttle
from tests.boxlab.laboratory import laboratory
from tests.boxlab.switch import GIGABIT, Link

SHARE = "20%"
COUNTS = (1, 2, 4)
PROMPTS = ("In the beginning God", "The file is not")
TOKENS, TOP_K = 17, 4


@dataclass(frozen=True)
class Run:
    """read_bytes: a token, of each box; wire_bytes: a token; num_lent: experts that other boxes
    computed, a token
    """

    answer: Answer
    read_bytes: list[float]
    wire_bytes: float
    num_lent: float

    @property
    def hit_ratio(self) -> float:
        return 1 - sum(self.read_bytes) / (NUM_LAYERS * TOP_K * RECORD_BYTES)

    @property
    def at_most(self) -> float:
        """Tokens/s that the disks give if they are never idle."""
        return len(self.read_bytes) * EDGE_SSD.bytes_per_s / sum(self.read_bytes)

    @property
    def wire_ratio(self) -> float:
        """Bytes on the wire over those of weights that did not travel."""
        return self.wire_bytes / (self.num_lent * RECORD_BYTES) if self.num_lent else 0.0


def main() -> None:
    runs = defaultdict[int, list[Run]](list)
    for counts in (COUNTS, COUNTS[::-1]):
        for count in counts:
            runs[count].append(measure(count))
            print(f"{count}: {runs[count][-1].answer.tokens_per_s:.2f} tokens/s", flush=True)
    one = statistics.median(run.answer.tokens_per_s for run in runs[1])
    assert len({tuple(run.answer.token_ids) for found in runs.values() for run in found}) == 1
    show(
        "Experts of 24 MiB, a fifth of them in the memory of each box, 200 MB/s a disk, "
        ".3 ms and 1 Gbit/s between boxes; both orders; all the same tokens",
        ["boxes", "tokens/s", "over one", "disks give at most", "hits %", "MiB a token, a box",
         "wire KiB a token", "wire % of weights"],
        [_row(count, found, one) for count, found in runs.items()],
    )  # fmt: skip


def _row(count: int, runs: Sequence[Run], one: float) -> list[str]:
    speeds = [run.answer.tokens_per_s for run in runs]
    reads = [[read / 2**20 for read in run.read_bytes] for run in runs]
    return [
        str(count),
        spread(speeds, 2),
        f"{statistics.median(speeds) / one:.2f}",
        spread([run.at_most for run in runs], 2),
        spread([100 * run.hit_ratio for run in runs]),
        spread([read for found in reads for read in found], 0),
        f"{statistics.median(run.wire_bytes for run in runs) / 1024:.0f}",
        f"{100 * statistics.median(run.wire_ratio for run in runs):.4f}",
    ]


def measure(
    count: int, share: str = SHARE, link: Link = GIGABIT, speed: Throttle = EDGE_SSD
) -> Run:
    """share: of the experts, in the memory of each box"""
    flags = ("--experts-memory", share)
    with laboratory([widened_image()] * 4, link, speed) as boxes, ExitStack() as stack:
        main, *workers = boxes[:count]
        for box in workers:
            stack.enter_context(box.worker(*flags))
        stack.enter_context(main.main(workers, *flags))
        client = stack.enter_context(main.client())
        ask(client, PROMPTS[0], TOKENS, seed=1)  # fills the memories
        first = next(iter(client.generate(PROMPTS[1], max_tokens=1, temperature=0.9, seed=2)))
        assert first
        before = _figures(boxes[:count])
        answer = ask(client, PROMPTS[1], TOKENS, seed=2)  # its prompt is kept: decode alone
        after = _figures(boxes[:count])
        more = [
            [b - a for a, b in zip(*pair, strict=True)] for pair in zip(before, after, strict=True)
        ]
        read, sent, lent = more
        return Run(answer, [one / TOKENS for one in read], sum(sent) / TOKENS, sum(lent) / TOKENS)


def _figures(boxes: Sequence[Box]) -> tuple[list[int], list[int], list[int]]:
    """Bytes read of each; bytes on the wire and experts computed of each worker."""
    read, sent, lent = [box.disk.bytes_read for box in boxes], [], []
    with boxes[0].client() as client:
        seen = client.stats()
    for box in boxes[1:]:
        there = seen.of(box=box.address)
        sent.append(there.bytes_sent + there.bytes_received)
        with rpc.connect(box.run.address("worker")) as channel:
            stats = Stats.from_pb(WorkerStub(channel).Stats(stats_pb.StatsRequest(), timeout=10))
        lent.append(stats.experts_computed)
    return read, sent, lent
