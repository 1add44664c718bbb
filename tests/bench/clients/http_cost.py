"""What HTTP adds to the same answer over gRPC, on the shipped model."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from http.client import OK, HTTPConnection
from itertools import pairwise
from statistics import fmean
from urllib.parse import urlparse

from tests.bench.clients.second_turn import shipped
from tests.bench.http_load import held
from tests.bench.table import machine, show, spread
from tests.stack import ServedStack

PROMPT, TOKENS, PAIRS = "In the beginning", 64, 30


def http_cost(_: argparse.Namespace) -> None:
    print(machine())
    with shipped("--http", "0") as stack:
        ways: list[Callable[[ServedStack], Iterator[float]]] = [_over_grpc, _over_http]
        for way in ways:
            _timed(way, stack)
        pairs = []
        for number in range(PAIRS):
            order = ways if number % 2 == 0 else ways[::-1]
            pairs.append({way: _timed(way, stack) for way in order})
        _, pss = held(stack)
    rows = []
    for place, name in enumerate(("first token", "a token")):
        grpc, http = ([figures[way][place] for figures in pairs] for way in ways)
        added = [after - before for before, after in zip(grpc, http, strict=True)]
        rows.append([name, spread(grpc, 2), spread(http, 2), spread(added, 2)])
    show(f"{PAIRS} pairs of {TOKENS} tokens, ms", ["", "gRPC", "HTTP", "added"], rows)
    print(f"gateway: {pss:.1f} MiB of PSS")


def _timed(
    way: Callable[[ServedStack], Iterator[float]], stack: ServedStack
) -> tuple[float, float]:
    """Milliseconds to the first token, and of each after it."""
    began_s = time.monotonic()
    at_s = list(way(stack))
    assert len(at_s) == TOKENS, len(at_s)
    return 1e3 * (at_s[0] - began_s), 1e3 * fmean(b - a for a, b in pairwise(at_s))


def _over_grpc(stack: ServedStack) -> Iterator[float]:
    with stack.client() as node:
        for _ in node.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True):
            yield time.monotonic()


def _over_http(stack: ServedStack) -> Iterator[float]:
    address = urlparse(stack.url)
    assert address.hostname
    connection = HTTPConnection(address.hostname, address.port)
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps({**body, "temperature": 0}))
    reply = connection.getresponse()
    assert reply.status == OK, reply.read()
    while line := reply.readline():
        if line.startswith(b"data: {"):
            at_s = time.monotonic()
            if json.loads(line[6:])["choices"][0]["finish_reason"] is None:  # the last has no token
                yield at_s
    connection.close()
