"""Runs on file, a JSON line each: what was measured is kept when a long comparison is cut short."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.bench.peers.run import Answer, Case, RunResult


def append(path: Path, result: RunResult) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def load(path: Path) -> list[RunResult]:
    """In the order measured; none when there is no file."""
    if not path.exists():
        return []
    return [_result(json.loads(line)) for line in path.read_text().splitlines()]


def _result(fields: dict[str, Any]) -> RunResult:
    fields["case"] = Case(**fields["case"])
    fields["answers"] = [Answer(**answer) for answer in fields["answers"]]
    return RunResult(**fields)
