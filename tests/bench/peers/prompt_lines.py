"""The inner end of a worker: a JSON line a prompt comes in, a line a token goes out.

Imported inside the memory limit of an engine, so it imports nothing itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable

TEMPERATURE = 0.9
READY = "ready"


def serve(generate: Callable[[list[int], int, int], Iterable[int]]) -> None:
    """Answers until standard input ends. generate: prompt, max_tokens, seed -> token ids."""
    print(READY, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        for token in generate(request["prompt"], request["max_tokens"], request["seed"]):
            print(token, flush=True)
