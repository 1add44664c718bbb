"""The stack of deploy/docker-compose.yml in a real container engine: it serves, keeps its limits,
and survives what a box does to it.

`make container-test` runs it where an engine answers; BASE names a local image to build from where
no registry is in reach, ENGINE_RESTART the command that restarts the engine.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest

from compute_node.client.node_client import NodeClient
from deploy.stack.run_dir import RunDir
from proto import errors
from tests.stack import MODEL, ROOT, flashmoe, wait_for

pytestmark = [pytest.mark.container, pytest.mark.timeout(900)]

DAEMONS = ("expert_store", "compute_node", "scheduler")
SERVICES = ("valkey", *DAEMONS)
PROMPT = "In the beginning"
MEMORY_BYTES = 1024**3
UNHEALTHY_S = 120  # 30 s to start in, then three checks


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """With this environment, also under a make of its own."""
    words = ["make", "--no-print-directory", f"BIN={Path(sys.executable).parent}", *arguments]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=800)


@dataclass
class Containers:
    """One stack, configured in `out` and started by the Makefile."""

    out: Path

    @property
    def run(self) -> RunDir:
        return RunDir(self.out / "run")

    @property
    def project(self) -> str:
        return _variables(self.out)["COMPOSE_PROJECT_NAME"]

    def up(self, *variables: str) -> str:
        """The command that `make up` prints."""
        done = make("up", f"CONTAINER={self.out}", "MEMORY=1GiB", *variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()[-1]

    def id(self, service: str) -> str:
        labels = (f"project={self.project}", f"service={service}")
        filters = (f"--filter=label=com.docker.compose.{label}" for label in labels)
        return docker("ps", "--all", "--quiet", "--no-trunc", *filters)

    def inspect(self, service: str) -> dict[str, Any]:
        return dict(json.loads(docker("inspect", self.id(service)))[0])

    def health(self, service: str) -> str:
        return str(self.inspect(service)["State"]["Health"]["Status"])

    def kill(self, service: str) -> None:
        """The daemon itself, as the kernel would: the engine was not asked and does restart it."""
        init = psutil.Process(self.inspect(service)["State"]["Pid"])
        init.children()[0].send_signal(signal.SIGKILL)

    def client(self) -> NodeClient:
        return NodeClient(self.run.address("compute_node"))

    def tokens(self, max_tokens: int = 64) -> list[int]:
        with self.client() as node:
            return node.generate(PROMPT, max_tokens=max_tokens, ignore_eos=True).run().token_ids

    def wait(self) -> None:
        done = flashmoe("container-wait", str(self.out), "--timeout", "120", timeout_s=150)
        assert done.returncode == 0, done.stderr

    def status(self) -> dict[str, Any]:
        done = flashmoe("status", "--run-dir", str(self.run.path), "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return dict(json.loads(done.stdout))

    def check_down(self) -> None:
        """`make down`; nothing of the project may be left in the engine or in memory."""
        done = make("down", f"CONTAINER={self.out}")
        assert done.returncode == 0, done.stdout + done.stderr
        filters = f"--filter=label=com.docker.compose.project={self.project}"
        assert docker("ps", "--all", "--quiet", filters) == ""
        assert docker("volume", "ls", "--quiet", filters) == ""
        assert docker("network", "ls", "--quiet", filters) == ""
        assert self.project not in Path("/proc/mounts").read_text()  # the experts' tmpfs
        assert not [path for path in self.run.path.iterdir() if path.is_socket()]


def _variables(out: Path) -> dict[str, str]:
    lines = (out / "compose.env").read_text().splitlines()
    return dict(line.replace("'", "").split("=", 1) for line in lines)


@contextmanager
def started(out: Path) -> Iterator[Containers]:
    containers = Containers(out)
    try:
        containers.up()
        yield containers
    finally:
        containers.check_down()


@pytest.fixture(scope="module")
def shared(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """A stack for the tests that leave it serving."""
    with started(tmp_path_factory.mktemp("c")) as containers:
        yield containers


@pytest.fixture
def own(image: str, run_dir: Path) -> Iterator[Containers]:
    """A stack that a test may break."""
    with started(run_dir) as containers:
        yield containers


def test_it_is_healthy_and_answers_from_the_host(image: str, run_dir: Path) -> None:
    """Red when `make up` returns before the node serves, prints no command, or drops
    EXPERTS_MEMORY.
    """
    containers = Containers(run_dir)
    try:
        command = containers.up("EXPERTS_MEMORY=64")
        done = subprocess.run(
            f"{command} --max-tokens 8", shell=True, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "8 tokens, cut at --max-tokens" in done.stderr
        assert containers.status()["compute_node"]["slots"] == 64
        for service in SERVICES:
            wait_for(lambda s=service: containers.health(s) == "healthy", 60, f"{service} healthy")
    finally:
        containers.check_down()


def test_limits_are_kept_under_load(shared: Containers) -> None:
    """Red for a `--memory` that the limits exceed, and for a room in
    deploy/verbs/container_config.py that makes the kernel kill a container.
    """
    shared.tokens(256)
    states = {service: shared.inspect(service) for service in SERVICES}
    assert sum(state["HostConfig"]["Memory"] for state in states.values()) <= MEMORY_BYTES
    for service, state in states.items():
        assert state["HostConfig"]["MemorySwap"] == state["HostConfig"]["Memory"]
        assert not state["State"]["OOMKilled"]
        assert peak_bytes(shared.id(service)) <= state["HostConfig"]["Memory"]


def test_doctor_inside_gives_no_advice_for_a_box(shared: Containers) -> None:
    """Red for `/dev/shm ... set shm_size in compose`: the experts are not there."""
    words = ["docker", "exec", shared.id("expert_store"), "flashmoe", "doctor", "--path", "/store"]
    told = subprocess.run(words, capture_output=True, text=True).stdout
    assert "ok /segment: " in told
    assert "in a container, run doctor on the host instead" in told


def test_http_is_served_on_loopback_where_asked(image: str, run_dir: Path) -> None:
    """Red for a gateway that other hosts reach, or that finds no node."""
    store = ROOT / ".flashmoe/tiny-moe"
    flags = ["--memory", "1200MiB", "--http", "18473", "--out", str(run_dir)]
    configured = flashmoe("container-config", str(store), *flags)
    assert configured.returncode == 0, configured.stderr
    up = configured.stdout.strip().splitlines()[-1]
    containers = Containers(run_dir)
    try:
        started = subprocess.run(up, shell=True, capture_output=True, text=True, timeout=120)
        assert started.returncode == 0, started.stderr
        containers.wait()
        with containers.client() as node:
            text = node.generate(PROMPT, max_tokens=16).run().text
        body = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0}
        asked = Request(
            "http://127.0.0.1:18473/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(asked, timeout=60) as answer:
            assert json.load(answer)["choices"][0]["text"] == text
        listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.laddr.port == 18473}
        assert listening == {"127.0.0.1"}
    finally:
        down = up.removesuffix("up --detach") + "down --volumes"
        assert subprocess.run(down, shell=True, capture_output=True, timeout=120).returncode == 0
        containers.check_down()


def peak_bytes(container: str) -> int:
    """As its cgroup counted, of either version."""
    v1, v2 = "/sys/fs/cgroup/memory/memory.max_usage_in_bytes", "/sys/fs/cgroup/memory.peak"
    return int(docker("exec", container, "sh", "-c", f"cat {v1} 2>/dev/null || cat {v2}"))


@pytest.mark.parametrize("service", ["valkey", "expert_store", "scheduler"])
def test_a_daemon_killed_midway_changes_no_token(shared: Containers, service: str) -> None:
    """Red without `restart`, and with the segment on a shared /dev/shm of the store's."""
    expected = shared.tokens(128)
    restarts = shared.inspect(service)["RestartCount"]
    with shared.client() as node:
        generation = node.generate(PROMPT, max_tokens=128, ignore_eos=True)
        pieces = iter(generation)
        for _ in range(4):
            next(pieces)
        shared.kill(service)
        for _ in pieces:
            pass
    assert generation.run().token_ids == expected
    wait_for(lambda: shared.inspect(service)["RestartCount"] > restarts, 60, "the engine")
    shared.wait()


def test_a_node_killed_midway_says_so_and_answers_the_next(shared: Containers) -> None:
    """Red when the client hangs, or the node does not come back."""
    expected = shared.tokens()
    with shared.client() as node:
        pieces = iter(node.generate(PROMPT, max_tokens=512, ignore_eos=True))
        next(pieces)
        shared.kill("compute_node")
        with pytest.raises(errors.Unavailable):
            list(pieces)
    wait_for(lambda: _answers(shared), 60, "the node to come back")
    assert shared.tokens() == expected


def _answers(containers: Containers) -> bool:
    try:
        return bool(containers.tokens(1))
    except errors.FlashMoEError:
        return False


def test_six_kills_are_survived(own: Containers) -> None:
    """Red for `restart: on-failure:5`, which counts over a container's life."""
    for kill in range(1, 7):
        own.kill("scheduler")
        wait_for(lambda n=kill: own.inspect("scheduler")["RestartCount"] == n, 60, "the engine")
        own.wait()


def test_stopped_under_load_it_drains(own: Containers) -> None:
    """Red for a grace that is too short: then the engine kills, and the exit status is 137."""
    with own.client() as node:
        pieces = iter(node.generate(PROMPT, max_tokens=1500, ignore_eos=True))
        next(pieces)
        ids = [own.id(service) for service in SERVICES]
        stopping = subprocess.Popen(["docker", "stop", "--time", "30", *ids])
        try:
            assert len(list(pieces)) > 1
        except errors.FlashMoEError as error:
            assert error.retryable
        assert stopping.wait(60) == 0
    assert {s: own.inspect(s)["State"]["ExitCode"] for s in SERVICES} == dict.fromkeys(SERVICES, 0)


def test_a_reboot_brings_it_back(own: Containers) -> None:
    """Red for `restart: on-failure`, and for daemons that need one another's order of start."""
    command = os.environ.get("ENGINE_RESTART")
    if not command:
        pytest.skip("give ENGINE_RESTART, the command that restarts the engine")
    expected = own.tokens()
    subprocess.run(command, shell=True, check=True, timeout=300, stdout=subprocess.DEVNULL)
    own.wait()
    assert own.tokens() == expected


def test_a_refusal_is_told_and_not_tried_again(image: str, run_dir: Path) -> None:
    """Red without --hold (the engine starts it again and again), and when `make up` does not
    wait.
    """
    containers = Containers(run_dir)
    broken = run_dir / "broken-compose"
    broken.write_text(
        f"#!/bin/sh\necho 'bogus = 1' >> {run_dir}/flashmoe.toml\nexec {_compose()} \"$@\"\n"
    )
    broken.chmod(0o755)
    try:
        done = make("up", f"CONTAINER={run_dir}", f"COMPOSE={broken}")
        assert done.returncode != 0
        sentence = "scheduler refuses to start: /etc/flashmoe.toml, table [scheduler]: unknown key"
        assert sentence in done.stderr
        wait_for(lambda: containers.health("scheduler") == "unhealthy", UNHEALTHY_S, "unhealthy")
        state = containers.inspect("scheduler")
        assert (state["RestartCount"], state["State"]["Running"]) == (0, True)
        logs = subprocess.run(["docker", "logs", state["Id"]], capture_output=True, text=True)
        assert "unknown key 'bogus'" in logs.stderr.splitlines()[-1]
        containers.up()  # with the configuration as it should be
        assert containers.inspect("scheduler")["RestartCount"] == 1
    finally:
        containers.check_down()


def by_our_compose(printed: str) -> str:
    """The command that container-config printed; a stack is not driven by both generations."""
    return _compose() + printed[printed.index(" --env-file") :].rstrip()


def _compose() -> str:
    rule = "compose-name: ; @echo $(COMPOSE)"
    printed = make("--eval", rule, "compose-name")
    return printed.stdout.strip()


def test_another_plan_and_another_setting_reach_what_runs(own: Containers, tmp_path: Path) -> None:
    """Red for a volume that has the size of the first plan, and without the label that follows from
    the configuration.
    """
    own.up("EXPERTS_MEMORY=100%")
    assert own.status()["compute_node"]["slots"] == 256
    before = {service: own.id(service) for service in SERVICES}
    settings = tmp_path / "flashmoe.toml"
    settings.write_text("[scheduler]\nlearn_rows_per_step = 16\n")
    store = str(ROOT / ".flashmoe/tiny-moe")
    flags = ["--memory", "1GiB", "--experts-memory", "100%", "--config", str(settings)]
    done = flashmoe("container-config", store, "--out", str(own.out), *flags)
    assert done.returncode == 0, done.stderr
    subprocess.run(by_our_compose(done.stdout), shell=True, check=True, capture_output=True)
    own.wait()
    assert own.id("scheduler") != before["scheduler"]
    assert own.id("valkey") == before["valkey"]


def test_a_second_stack_of_a_store_in_an_awkward_folder(shared: Containers, run_dir: Path) -> None:
    """Red for an unquoted compose.env, a fixed project name, which replaces the first stack, and
    files that only root reads.
    """
    awkward = run_dir / "a #b $HOME 'c"
    shutil.copytree(MODEL, awkward / "model")
    assert (
        flashmoe("index", str(awkward / "model"), "--out", str(awkward / "store")).returncode == 0
    )
    words = [str(awkward / "store"), "--memory", "1GiB", "--out", str(run_dir / "o 'o")]
    done = flashmoe("container-config", *words, umask=0o077)
    assert done.returncode == 0, done.stderr
    second, start = Containers(run_dir / "o 'o"), by_our_compose(done.stdout)
    try:
        subprocess.run(start, shell=True, check=True, capture_output=True)
        second.wait()
        assert second.project != shared.project
        assert second.tokens() == shared.tokens()
    finally:
        down = start.removesuffix("up --detach") + "down --volumes"
        subprocess.run(down, shell=True, check=True, capture_output=True)


def test_the_image_has_the_locked_versions(image: str) -> None:
    """Red when a pip install of deploy/Dockerfile has no `-c requirements.lock`."""
    script = (
        "import importlib.metadata as m, json;"
        "print(json.dumps({d.name: d.version for d in m.distributions()}))"
    )
    found = json.loads(docker("run", "--rm", image, "python", "-c", script))
    installed = {_canonical(name): version.split("+")[0] for name, version in found.items()}
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pairs = [line.split("==") for line in lines if "==" in line]
    locked = {_canonical(name): version for name, version in pairs}
    assert installed.pop("flashmoe") == "0.1.0"
    installed.pop("async-timeout", None)  # redis needs it on a Python before 3.11.3
    assert installed.items() <= locked.items()
    assert "torch" in installed


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-")
