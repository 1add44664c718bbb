"""What a layer costs more when its experts are computed on another box, where all are in memory."""

from __future__ import annotations

from contextlib import ExitStack

from tests.bench.boxes.answers import ask, prompts
from tests.bench.boxes.models import NUM_LAYERS, shipped_image
from tests.bench.table import percentile, show
from tests.boxlab.laboratory import laboratory
from tests.boxlab.switch import FAST_ETHERNET, GIGABIT, WIFI, Link

LINKS = {
    "none": Link(0.0, 10_000_000_000),
    "1 Gbit/s, .3 ms": GIGABIT,
    "100 Mbit/s, .3 ms": FAST_ETHERNET,
    "1 Gbit/s, 3 ms": WIFI,
}
ROUNDS, TOKENS = 4, 49
ALL, LEAST = ("--experts-memory", "100%"), ("--experts-memory", "12.5%")


def main() -> None:
    with laboratory([shipped_image()] * 3) as (local, remote, worker), ExitStack() as stack:
        stack.enter_context(worker.worker(*ALL))
        stack.enter_context(local.main([], *ALL))
        stack.enter_context(remote.main([worker], *LEAST))
        clients = {
            "local": stack.enter_context(local.client()),
            "remote": stack.enter_context(remote.client()),
        }
        rows = []
        for name, link in LINKS.items():
            for box in (remote, worker):
                box.switch.set(box.name, link)
            gaps_ms: dict[str, list[float]] = {which: [] for which in clients}
            for number in range(-1, ROUNDS):
                order = list(clients) if number % 2 else list(reversed(clients))
                prompt = prompts(3)[number % 3]
                for which in order:
                    answer = ask(clients[which], prompt, TOKENS, seed=number % 3)
                    if number >= 0:  # the first time is cold
                        gaps_ms[which] += [1e3 * gap for gap in answer.gaps_s]
            found = [
                [percentile(gaps_ms[which], share) for which in ("local", "remote")]
                for share in (0.5, 0.95)
            ]
            print(f"{name}: {found}", flush=True)
            more = [(there - here) / NUM_LAYERS for here, there in found]
            rows.append(
                [
                    name,
                    *(f"{here:.2f} / {there:.2f}" for here, there in found),
                    f"{more[0]:.2f}",
                    f"{more[1]:.2f}",
                    f"{1e3 * link.round_trip_s + 0.8:.2f}",
                ]
            )
        show(
            f"A token of the shipped model, 8/9 of the experts on the other box, all in memory, "
            f"{ROUNDS} answers of {TOKENS - 1} tokens each way in turn",
            [
                "link",
                "token p50 local / remote ms",
                "p95",
                "more a layer p50 ms",
                "p95",
                "target p50",
            ],
            rows,
        )
