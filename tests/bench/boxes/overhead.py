"""What a layer costs more when its experts are computed on another box, where all are in memory."""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack

from tests.bench.boxes.answers import ask, prompts
from tests.bench.boxes.models import NUM_LAYERS, shipped_image
from tests.bench.table import percentile, show
from tests.boxlab.box import Box
from tests.boxlab.laboratory import laboratory
from tests.boxlab.switch import FAST_ETHERNET, GIGABIT, WIFI, Link

LINKS = {
    "none": Link(0.0, 10_000_000_000),
    "1 Gbit/s, .3 ms": GIGABIT,
    "100 Mbit/s, .3 ms": FAST_ETHERNET,
    "1 Gbit/s, 3 ms": WIFI,
}
ROUNDS, TOKENS = 4, 49
_PORT, _PINGS, _PAUSE_S, _BYTES = 9444, 300, 0.002, 2048
_ECHO = f"""
import socket
listener = socket.create_server(("", {_PORT}))
print("ready", flush=True)
end, _ = listener.accept()
end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while data := end.recv({_BYTES}):
    end.sendall(data)
"""
ALL, LEAST = ("--experts-memory", "100%"), ("--experts-memory", "12.5%")


def round_trip_s(near: Box, far: Box) -> float:
    """Median of short messages from one box to another and back, one every 2 ms, by Python."""
    command = far.command([sys.executable, "-c", _ECHO])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as echo:
        assert echo.stdout and echo.stdout.readline() == "ready\n"
        with near.inside():
            end = socket.create_connection((far.host, _PORT), 10)
        with end:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            took_s = []
            for _ in range(_PINGS):
                time.sleep(_PAUSE_S)
                began_s = time.perf_counter()
                end.sendall(bytes(_BYTES))
                left = _BYTES
                while left:
                    left -= len(end.recv(left))
                took_s.append(time.perf_counter() - began_s)
    return statistics.median(took_s)


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
            trips_ms = [1e3 * round_trip_s(remote, worker)]
            gaps_ms: dict[str, list[float]] = {which: [] for which in clients}
            for number in range(-1, ROUNDS):
                order = list(clients) if number % 2 else list(reversed(clients))
                prompt = prompts(3)[number % 3]
                for which in order:
                    answer = ask(clients[which], prompt, TOKENS, seed=number % 3)
                    if number >= 0:  # the first time is cold
                        gaps_ms[which] += [1e3 * gap for gap in answer.gaps_s]
            trips_ms.append(1e3 * round_trip_s(remote, worker))
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
                    " / ".join(f"{trip_ms:.2f}" for trip_ms in trips_ms),
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
                "a bare round trip before / after, ms",
            ],
            rows,
        )
