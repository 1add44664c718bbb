"""What operators read of a running stack stays as they know it: the families of the three metrics
pages, and the keys of `flashmoe status --json`. A changed line in stats.json is a decision.

Planted faults seen red: a help text changed, a counter given as a gauge, a label left out, a key
renamed, ages in a unit that Prometheus abbreviates (`_ms`).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.stack import ServedStack, flashmoe, served, wait_for

pytestmark = pytest.mark.system
DAEMONS = ("expert_store", "compute_node", "scheduler")
GOLDEN = Path(__file__).with_name("stats.json")
OF_THIS_RUN = (
    "le",
    "layer",
    "layers_ahead",
    "node",
    "predictor",
)  # labels whose values are the model's or the stack's


def test_pages_and_status_are_as_they_were(tiny_store: Path, run_dir: Path) -> None:
    with served(tiny_store, run_dir) as stack:
        stack.generate(max_tokens=64)
        wait_for(lambda: stack.status()["compute_node"]["advice_age_s"] is not None, 20, "advice")
        for name in DAEMONS:
            check_conventions(text_of_page(stack, name))
        said = flashmoe("status", "--run-dir", str(run_dir), "--json").stdout
        found = {
            "pages": {name: page(stack, name) for name in DAEMONS},
            "status": shape(known(json.loads(said))),
        }
    assert found == json.loads(GOLDEN.read_text())


def known(status: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Without the list of all that a daemon shows, to which every new counter comes."""
    return {
        name: {key: value for key, value in facts.items() if key != "stats"}
        for name, facts in status.items()
    }


def check_conventions(page: str) -> None:
    """Prometheus' own opinion of names, units and types, where its tool is installed."""
    if (promtool := shutil.which("promtool")) is not None:
        check = subprocess.run(
            [promtool, "check", "metrics"], input=page, capture_output=True, text=True
        )
        assert check.returncode == 0 and not check.stderr, check.stderr


def text_of_page(stack: ServedStack, name: str) -> str:
    port = (stack.run.path / f"{name}.metrics").read_text().strip()
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        return str(reply.read().decode())


def page(stack: ServedStack, name: str) -> dict[str, Any]:
    """Type, help and labels of each family of ours."""
    families = list(text_string_to_metric_families(text_of_page(stack, name)))
    return {
        family.name: {
            "type": family.type,
            "help": family.documentation,
            "labels": sorted({labels_of(sample.labels) for sample in family.samples}),
        }
        for family in families
        if family.name.startswith("flashmoe_")
    }


def labels_of(labels: dict[str, str]) -> str:
    shown = {name: "*" if name in OF_THIS_RUN else value for name, value in labels.items()}
    return ",".join(f"{name}={value}" for name, value in sorted(shown.items()))


def shape(value: Any) -> Any:
    """Keys and types; one item of a list stands for all."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value[:1]]
    return type(value).__name__
