"""Every query of the dashboard and of the rules, against a real Prometheus that scrapes a stack
under load, exact and within a lossy budget: each has data.

Planted faults seen red: a metric that nobody has any more, a label that is spelt otherwise, a rule
without a bound, a job whose path the gateway does not know.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ports import free_port
from tests.stack import ServedStack, served, wait_for
from tests.tuned import tuned_copy

FOLDER = Path(__file__).parents[2] / "deploy" / "observability"
DASHBOARD = json.loads((FOLDER / "grafana" / "flashmoe.json").read_text())
RULES = yaml.safe_load((FOLDER / "flashmoe.rules.yml").read_text())["groups"][0]["rules"]
BOUND = re.compile(r"(.+) [<>] [\d.]+")
WINDOW = "15s"

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="no Prometheus is installed"),
]


def queries() -> dict[str, str]:
    """By what they are for; of a rule, its figure without the bound."""
    found = {
        f"{panel['title']}, {target['refId']}": target["expr"].replace("$__rate_interval", WINDOW)
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
    }
    for rule in RULES:
        bounded = BOUND.fullmatch(rule["expr"])
        assert bounded, f"{rule['alert']} has no bound"
        found[rule["alert"]] = bounded[1]
    return found


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def values(self, query: str) -> list[float]:
        """Of every series, as it is now."""
        address = f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with urllib.request.urlopen(address, timeout=10) as reply:
            found = json.loads(reply.read())["data"]["result"]
        return [float(series["value"][1]) for series in found]

    def has_data(self, query: str) -> bool:
        return any(math.isfinite(value) for value in self.values(query))


@contextmanager
def scraping(stack: ServedStack, folder: Path) -> Iterator[Prometheus]:
    """The configuration as it is shipped, but for where the stack is and how often it is asked."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [stack.url.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(FOLDER / "flashmoe.rules.yml", folder)
    where = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={where}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield Prometheus(f"http://{where}")
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def under_load(stack: ServedStack) -> Iterator[None]:
    """Exact, lossy and repeated requests, over gRPC and HTTP, for the block."""
    stop = threading.Event()

    def ask(quality: str) -> None:
        while not stop.is_set():
            stack.generate("In the beginning God " * 12, max_tokens=48, quality=quality)
            get(f"{stack.url}/v1/models")

    threads = [threading.Thread(target=ask, args=(quality,)) for quality in ("exact", "50%")]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return bytes(reply.read())


@pytest.fixture
def lossy_store(tiny_store: Path, tmp_path: Path) -> Path:
    return tuned_copy(tiny_store, tmp_path / "store")


@pytest.mark.timeout(300)
def test_no_panel_and_no_rule_is_without_data(
    lossy_store: Path, run_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "prometheus").mkdir()
    left = queries()
    with (
        served(lossy_store, run_dir, "--http", "0", "--memory", "1GiB") as stack,
        scraping(stack, tmp_path / "prometheus") as prometheus,
        under_load(stack),
    ):
        wait_for(lambda: answers(prometheus), 30, "Prometheus")
        deadline = time.monotonic() + 60
        while left and time.monotonic() < deadline:
            time.sleep(1)
            left = {name: one for name, one in left.items() if not prometheus.has_data(one)}
        assert left == {}
        assert prometheus.values("up") == [1.0] * 5
        assert prometheus.values('ALERTS{severity="critical"}') == []


def answers(prometheus: Prometheus) -> bool:
    try:
        return prometheus.values("up") != []
    except OSError:
        return False


def test_their_own_tool_takes_the_files() -> None:
    command = ["promtool", "check", "config", str(FOLDER / "prometheus.yml")]
    check = subprocess.run(command, capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr


def test_the_dashboard_is_one_that_grafana_can_place() -> None:
    """Ids are distinct, no panel overlaps another, every one has a title and a unit."""
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 20
    cells = [
        (x, y)
        for panel in panels
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24
    assert all(panel["title"] and panel["fieldConfig"]["defaults"]["unit"] for panel in panels)
