"""Many connections on one gateway: every stream equals its undisturbed text, or ends with an error
that a client understands; nothing leaks.

    python -m tests.bench.http_load [SECONDS] [CONNECTIONS]
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from expert_store.offline.index import index
from tests.bench.table import machine, show
from tests.stack import MODEL, ServedStack, served

PROMPTS = ("In the beginning", "The use of", "A file is", "He said", "When the", "#include")
BROKEN = "broken off"  # the gateway itself died: clients raise a connection error
_MIB = 1024 * 1024


class Held(NamedTuple):
    """By the gateway."""

    descriptors: int
    pss_mib: float


@dataclass
class Outcomes:
    """by_kind: "equal", an HTTP status, the type of an error event, BROKEN

    wrong: what no client could understand
    """

    by_kind: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


async def load(
    url: str,
    expected: dict[str, str],
    until: float | threading.Event,
    connections: int,
    may_break: bool = False,
    outcomes: Outcomes | None = None,
) -> Outcomes:
    """Streams over `connections` at once, one after the other on each.

    until:     seconds, or what is set at the end
    may_break: the gateway is killed meanwhile
    outcomes:  filled meanwhile, and returned
    """
    outcomes = Outcomes() if outcomes is None else outcomes
    is_over = _ending(until)

    async def go_on(number: int) -> None:
        while not is_over():
            number += 1
            prompt = PROMPTS[number % len(PROMPTS)]
            try:
                status, text = await stream(url, prompt)
            except (OSError, asyncio.IncompleteReadError):
                outcomes.by_kind[BROKEN] += 1
                if not may_break:
                    outcomes.wrong.append("a connection broke")
                await asyncio.sleep(0.1)
                continue
            _judge(outcomes, status, text, expected[prompt], may_break)
            if status != "200":
                await asyncio.sleep(0.2)

    await asyncio.gather(*(go_on(number) for number in range(connections)))
    return outcomes


def _ending(until: float | threading.Event) -> Callable[[], bool]:
    if isinstance(until, threading.Event):
        return until.is_set
    end_s = time.monotonic() + until
    return lambda: time.monotonic() >= end_s


def _judge(outcomes: Outcomes, status: str, text: str, expected: str, may_break: bool) -> None:
    if status == "200":
        outcomes.by_kind["equal" if text == expected else "other text"] += 1
        if text != expected:
            outcomes.wrong.append(f"{text!r} is not {expected!r}")
    elif status == BROKEN:
        outcomes.by_kind[BROKEN] += 1
        if not may_break:
            outcomes.wrong.append("a stream ended without an end")
    else:
        outcomes.by_kind[status] += 1
        if not text:
            outcomes.wrong.append(f"{status} says nothing")


async def stream(url: str, prompt: str) -> tuple[str, str]:
    """ "200" and the text; or a status or the type of an error event, and the error's message."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "stream": True}
        data = json.dumps({**body, "ignore_eos": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        status = (await reader.readuntil(b"\r\n")).split()[1].decode()
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        answer = (await reader.read()).decode()
    finally:
        writer.close()
    if status != "200":
        return status, json.loads(answer)["error"]["message"]
    assert "transfer-encoding: chunked" in head
    return _read_events(answer)


def _read_events(answer: str) -> tuple[str, str]:
    """One event a chunk of HTTP."""
    lines = [line.removeprefix("data: ") for line in answer.split("\r\n") if line[:6] == "data: "]
    events = [line.strip() for line in lines]
    if events and events[-1] == "[DONE]":
        documents = [json.loads(event) for event in events[:-1]]
        return "200", "".join(c["text"] for one in documents for c in one["choices"])
    last: dict[str, Any] = json.loads(events[-1]) if events else {}
    if "error" in last:
        return last["error"]["type"], last["error"]["message"]
    return BROKEN, ""


def undisturbed(stack: ServedStack) -> dict[str, str]:
    with stack.client() as node:
        return {
            prompt: node.generate(prompt, max_tokens=24, ignore_eos=True).run().text
            for prompt in PROMPTS
        }


def held(stack: ServedStack) -> Held:
    process = psutil.Process(stack.pid("gateway"))
    return Held(process.num_fds(), process.memory_full_info().pss / _MIB)


def loaded(stack: ServedStack, seconds: float, connections: int) -> tuple[Outcomes, Held]:
    """A load, and what the gateway held in the middle of it."""

    async def both() -> tuple[Outcomes, Held]:
        running = asyncio.create_task(load(stack.url, expected, seconds, connections))
        await asyncio.sleep(seconds / 2)
        middle = held(stack)
        return await running, middle

    expected = undisturbed(stack)
    return asyncio.run(both())


def main(seconds: float = 300.0, connections: int = 200) -> None:
    with tempfile.TemporaryDirectory(prefix="fm-") as folder:
        store, run = Path(folder) / "tiny-moe", Path(folder) / "run"
        index(MODEL, store)
        with served(store, run, "--http", "0", "--experts-memory=100%") as stack:
            before = held(stack)
            outcomes, middle = loaded(stack, seconds, connections)
            time.sleep(2)
            after = held(stack)
    rows = [[kind, str(num)] for kind, num in outcomes.by_kind.most_common()]
    facts = list(zip(before, middle, after, strict=True))
    rows += [["descriptors before, amid, after", ", ".join(str(num) for num in facts[0])]]
    rows += [["PSS before, amid, after, MiB", ", ".join(f"{mib:.1f}" for mib in facts[1])]]
    rows += [["wrong", str(outcomes.wrong[:3])]]
    show(
        f"HTTP load: {connections} connections, {seconds:g} s; {machine()}",
        ["streams", "number"],
        rows,
    )


if __name__ == "__main__":
    main(*(kind(text) for kind, text in zip((float, int), sys.argv[1:], strict=False)))
