"""A cluster on real Ray: a head and two more boxes, each with a raylet at an address of its own on
this machine, a main node, two workers, one of which borrows the main one's experts, and a shadow as
real daemons. All of them, and Ray, show each other certificates.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w

from compute_node.client.node_client import NodeClient
from deploy.report.status import check_health
from deploy.stack.run_dir import RunDir
from expert_store.offline.pack import pack
from proto.rpc import TlsFiles
from tests.certificates import certificate, certificate_shown, files
from tests.ports import free_port
from tests.stack import MODEL, ROOT, served, wait_for

PYTHON = ROOT / ".flashmoe/cluster-venv/bin/python"
needs_ray = pytest.mark.skipif(not PYTHON.exists(), reason="`make cluster` was not run")
pytestmark = [pytest.mark.system, needs_ray, pytest.mark.timeout(1200)]
PROMPT, TOKENS = "In the beginning God created", 48
PATIENT_S = 240  # Ray takes seconds to start, and minutes on a machine that is busy
Alone = Callable[[int], list[int]]
MOST = 1900  # tokens: longer than a fault takes


class RayCluster:
    """cluster.toml and what runs by it. The boxes are called main, w1, w2, which has no store, and
    shadow, which is at the address of w2.
    """

    def __init__(self, folder: Path, store: Path, small_store: Path) -> None:
        self.folder, self.file = folder, folder / "cluster.toml"
        self.hosts = dict(zip(("main", "w1", "w2"), loopback_hosts(), strict=True))
        self.environment = os.environ | {"RAY_TMPDIR": str(folder)}
        self.rays: dict[str, RayOfBox] = {}
        self.document: dict[str, Any] = {
            "model": str(store),
            "ray": f"{self.hosts['main']}:{free_port()}",
            "head": {"state_dir": str(folder / "head"), "state_port": free_port()},
            "certs": str(folder / "certs"),
            "main": self.box("main", "1700MiB") | {"lend_port": free_port()},
            "worker": [self.worker("w1"), self.worker("w2") | {"store": "main"}],
            "shadow": self.worker("shadow", "w2")
            | {"model": str(small_store), "experts_memory": "100%"},
        }
        self.write()

    def box(self, name: str, memory: str, host: str = "") -> dict[str, Any]:
        return {
            "name": name,
            "host": self.hosts[host or name],
            "memory": memory,
            "experts_memory": "25%",
            "run_dir": str(self.folder / name),
        }

    def worker(self, name: str, host: str = "") -> dict[str, Any]:
        return {**self.box(name, "1200MiB", host), "port": free_port()}

    @property
    def boxes(self) -> list[str]:
        return ["main", *(one["name"] for one in self.document["worker"]), "shadow"]

    def write(self) -> None:
        """The file, and new certificates of the boxes that it names."""
        self.file.write_text(tomli_w.dumps(self.document))
        self.call("certs", "--out", str(self.folder / "certs"))

    def tls(self, name: str) -> TlsFiles:
        return files(self.folder / "certs", name)

    def call(self, verb: str, *more: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [PYTHON, "-m", "deploy.cli", "cluster", verb, str(self.file), *more],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENT_S,
        )
        assert code in (None, done.returncode), done.stdout + done.stderr
        return done

    def start_ray(self, name: str) -> None:
        """By the verb that a box is given."""
        words = ["head", str(self.file)]
        if name != "main":
            words = ["join", str(self.file), "--box", name]
        command = [str(PYTHON), "-m", "deploy.cli", "cluster", *words]
        self.rays[name] = RayOfBox(command, self.environment, self.ray_log(name))

    def ray_log(self, name: str) -> Path:
        return self.folder / f"{name}.ray.log"

    def raylet(self, name: str) -> psutil.Process:
        return self._of_ray(name, f"--node_ip_address={self.hosts[name]}")

    def gcs(self) -> psutil.Process:
        return self._of_ray("main", "gcs_server")

    def _of_ray(self, name: str, word: str) -> psutil.Process:
        def found() -> psutil.Process | None:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(self.rays[name].pid).children():
                    if any(word in part for part in child.cmdline()):
                        return child
            return None

        process: psutil.Process = wait_for(found, PATIENT_S, f"{word} of {name}")
        return process

    def keeper(self, name: str) -> int:
        """Process id of the actor."""

        def found() -> int | None:
            with suppress(psutil.NoSuchProcess):
                for child in self.raylet(name).children():
                    if "Keeper" in " ".join(child.cmdline()):
                        return child.pid
            return None

        return int(wait_for(found, PATIENT_S, f"the actor of {name}"))

    def run(self, name: str) -> RunDir:
        return RunDir((self.folder / name).resolve())

    def daemon(self, name: str, module: str) -> int:
        """Process id of a daemon of the box."""
        config = str(self.run(name).config)
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if words[1:3] == ["-m", module] and words[-1] == config:
                return int(process.pid)
        raise LookupError(f"{name} {module}")

    def launcher(self, name: str) -> int:
        return psutil.Process(self.daemon(name, "expert_store")).ppid()

    def status(self, code: int = 0) -> dict[str, Any]:
        return dict(json.loads(self.call("status", "--json", code=code).stdout))

    def states(self) -> dict[str, str]:
        """By box; empty while Ray does not answer."""
        done = self.call("status", "--json", code=None)
        boxes = json.loads(done.stdout) if done.stdout else {}
        return {name: one["state"] for name, one in boxes.items()}

    def client(self) -> NodeClient:
        return NodeClient(self.run("main").address("compute_node"))

    def tokens(self, max_tokens: int = TOKENS) -> list[int]:
        with self.client() as node:
            return node.generate(PROMPT, max_tokens=max_tokens, ignore_eos=True).run().token_ids

    def up(self) -> list[str]:
        """Workers that are given work now."""
        with self.client() as node:
            known = node.stats().by("box")  # one that was just added comes to it
        boxes = [one["host"] + f":{one['port']}" for one in self.document["worker"]]
        return [one for one in boxes if one in known and known[one].up]

    def shadow_follows(self) -> bool:
        """The one that the file names."""
        shadow = self.document["shadow"]
        with self.client() as node:
            known = node.stats().by("shadow")
        found = known.get(f"{shadow['host']}:{shadow['port']}")
        return found is not None and bool(found.up)

    def wait_all_work(self) -> None:
        count = len(self.document["worker"])
        wait_for(lambda: len(self.up()) == count, PATIENT_S, "all workers to be given work")


class RayOfBox:
    """Starts the verb again whenever it ends, as systemd does by our unit."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._command, self._environment, self._log = command, environment, log
        self._stopping = threading.Event()
        self.num_started = 0
        self._start()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        self._stopping.set()
        while self._thread.is_alive():
            self._process.terminate()
            self._thread.join(1.0)

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=log
            )
        self.num_started += 1

    def _run(self) -> None:
        while True:
            self._process.wait()
            if self._stopping.wait(0.5):
                return
            self._start()


@contextmanager
def generating(cluster: RayCluster) -> Iterator[list[int]]:
    """A generation that begins before the block and is ended after it; the block gets its tokens
    as they come.
    """
    tokens, stop = list[int](), threading.Event()

    def run() -> None:
        with cluster.client() as node:
            answer = node.generate(PROMPT, max_tokens=MOST, ignore_eos=True, timeout_s=600)
            for piece in answer:
                tokens.append(piece.token_id)
                if stop.is_set():
                    answer.cancel()
                    return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_for(lambda: len(tokens) > 8, PATIENT_S, "the generation to begin")
        yield tokens
        before = len(tokens)
        wait_for(lambda: len(tokens) > before, PATIENT_S, "one more token")
    finally:
        stop.set()
        thread.join()


@pytest.fixture(scope="module")
def alone(tiny_store: Path) -> Iterator[Alone]:
    """What one box gives, a number of tokens."""
    folder = Path(tempfile.mkdtemp(prefix="fm-"))
    with served(tiny_store, folder, "--experts-memory=100%") as stack:
        yield lambda num: stack.generate(PROMPT, max_tokens=num)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(tiny_store: Path) -> Iterator[RayCluster]:
    """Afterwards nothing of it may be left."""
    folder = Path(tempfile.mkdtemp(prefix="fm-"))
    pack(MODEL, folder / "int8", weight_format="int8")
    made = RayCluster(folder, tiny_store, folder / "int8")
    try:
        made.start_ray("main")
        wait_for(lambda: is_open(made.document["ray"]), PATIENT_S, "Ray's head")
        for name in ("w1", "w2"):
            made.start_ray(name)
        made.raylet("w1"), made.raylet("w2")
        made.call("up")
        yield made
        made.call("down")
    finally:
        for name, ray in reversed(made.rays.items()):
            ray.stop()
            sys.stderr.write(f"{name}: {made.ray_log(name).read_text()[-3000:]}\n")
        for box in made.boxes:  # nothing runs, unless the test failed
            made.call("down", "--box", box, code=None)
    for name in made.boxes:
        assert not made.run(name).segment.exists() and not made.run(name).presence.exists()
    left = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in str(p.info["cmdline"])]
    assert left == []
    shutil.rmtree(folder, ignore_errors=True)


def is_refused(address: str, tls: TlsFiles) -> bool:
    """Whether who shows no certificate hears nothing there, and is closed on."""
    context = ssl.create_default_context(cafile=str(tls.ca))
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    try:
        with (
            socket.create_connection((host, int(port)), 20) as plain,
            context.wrap_socket(plain, server_hostname=host) as connection,
        ):
            return connection.recv(1) == b""
    except ssl.SSLError:
        return True


def is_open(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), 1):
        return True
    return False


def loopback_hosts() -> list[str]:
    """Three addresses of this machine that no other run of these tests has."""
    net = f"127.{100 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
    return [f"{net}.{last}" for last in (2, 3, 4)]


def test_who_has_no_certificate_reaches_neither_ray_nor_a_daemon(cluster: RayCluster) -> None:
    """Written against: `ray start` without its environment, boxes without `certs`."""
    main, worker = cluster.document["main"], cluster.document["worker"][0]
    at_store, at_worker = (
        f"{main['host']}:{main['lend_port']}",
        f"{worker['host']}:{worker['port']}",
    )
    own = certificate(cluster.tls("main").cert)  # Ray reads renewed ones when it starts
    assert certificate_shown(cluster.document["ray"], cluster.tls("w1")).subject == own.subject
    for address in (at_store, at_worker):
        assert check_health(address, cluster.tls("w2")) == "SERVING"
        assert check_health(address) == "away"
    assert is_refused(cluster.document["ray"], cluster.tls("w1"))


def test_tokens_are_those_of_one_box(cluster: RayCluster, alone: Alone) -> None:
    cluster.wait_all_work()
    assert cluster.tokens() == alone(TOKENS)
    boxes = cluster.status()
    assert [one["state"] for one in boxes.values()] == ["serving"] * 4
    for one in boxes.values():
        assert set(one["daemons"].values()) == {"SERVING"}
        assert 50 * 2**20 < one["ray_bytes"] < one["ceiling_bytes"] - one["stack_bytes"]
    [shadow] = boxes["main"]["shadow_nodes"].values()
    assert shadow["up"] and shadow["named"] + shadow["named_late"] + shadow["unheard"] > TOKENS


def test_a_generation_outlives_everything_beside_its_node(
    cluster: RayCluster, alone: Alone
) -> None:
    """An actor, a launcher, a raylet and the head end while it runs. Daemons whose actor or raylet
    ended are adopted, and the head knows its cluster.
    """
    node, kept = cluster.daemon("main", "compute_node"), cluster.daemon("w2", "compute_node.worker")
    shadow = cluster.daemon("shadow", "compute_node.shadow")
    w1, restarts = cluster.daemon("w1", "compute_node.worker"), cluster.status()["w1"]["restarts"]
    with generating(cluster) as tokens:
        keeper = cluster.keeper("w1")
        os.kill(keeper, signal.SIGKILL)
        wait_for(lambda: cluster.keeper("w1") != keeper, PATIENT_S, "Ray to make the actor again")
        assert cluster.daemon("w1", "compute_node.worker") == w1
        os.kill(cluster.launcher("w1"), signal.SIGKILL)
        rays = [cluster.rays[name] for name in ("w2", "main")]
        started = [ray.num_started for ray in rays]
        cluster.raylet("w2").kill()
        cluster.gcs().kill()
        wait_for(
            lambda: all(ray.num_started > n for ray, n in zip(rays, started, strict=True)),
            PATIENT_S,
            "Ray to start again",
        )
    assert tokens == alone(len(tokens))
    names = ("main", "w1", "w2", "shadow")
    wait_for(lambda: cluster.states() == dict.fromkeys(names, "serving"), PATIENT_S, "all boxes")
    assert cluster.daemon("main", "compute_node") == node
    assert cluster.daemon("w2", "compute_node.worker") == kept
    assert cluster.daemon("shadow", "compute_node.shadow") == shadow
    assert cluster.daemon("w1", "compute_node.worker") != w1
    assert cluster.status()["w1"]["restarts"] > restarts
    cluster.wait_all_work()
    assert cluster.tokens() == alone(TOKENS)


def test_boxes_join_and_leave_without_a_restart(cluster: RayCluster, alone: Alone) -> None:
    """A worker joins and leaves, and the shadow moves to another host and back.

    Red when the shadow is a setting of the main node, and when its stack stays where it was.
    """
    node, before = cluster.daemon("main", "compute_node"), deepcopy(cluster.document)
    cluster.document["worker"].append(cluster.worker("w3", "w2"))
    moved = cluster.worker("shadow", "w1") | {"run_dir": str(cluster.folder / "moved")}
    cluster.document["shadow"] |= moved | {"experts_memory": "100%"}
    cluster.write()
    cluster.call("up")
    cluster.wait_all_work()
    assert len(cluster.up()) == 3
    assert not cluster.run("shadow").segment.exists() and cluster.run("moved").segment.exists()
    wait_for(cluster.shadow_follows, PATIENT_S, "the shadow to follow from its new host")
    with generating(cluster) as tokens:
        cluster.document = before
        cluster.write()
        cluster.call("up")
        wait_for(cluster.shadow_follows, PATIENT_S, "the shadow to follow from its first host")
    assert tokens == alone(len(tokens))
    assert not cluster.run("w3").segment.exists() and not cluster.run("moved").segment.exists()
    assert cluster.daemon("main", "compute_node") == node
    boxes = cluster.status()
    assert set(boxes) == {"main", "w1", "w2", "shadow"}
    assert len(boxes["main"]["shadow_nodes"]) == 1


def test_down_says_which_box_is_dead_and_ends_the_others(cluster: RayCluster) -> None:
    """Red when `down` waits two minutes for the actor of a box that Ray sees no longer."""
    worker = cluster.daemon("w1", "compute_node.worker")
    cluster.rays["w1"].stop()
    wait_for(lambda: cluster.states().get("w1") == "away", PATIENT_S, "Ray to miss the box")
    said = cluster.call("down", code=4).stderr
    assert "w1: Ray does not reach it" in said and "--box w1" in said, said
    assert f"no Ray runs at {cluster.hosts['w1']}" in said, said
    assert [name for name in cluster.boxes if cluster.run(name).segment.exists()] == ["w1"]
    assert psutil.pid_exists(worker)
    assert cluster.call("down", "--box", "w1").stdout == "w1: stopped\n"
    assert not psutil.pid_exists(worker) and set(cluster.states().values()) == {"absent"}
    cluster.start_ray("w1")
    cluster.raylet("w1")
    cluster.call("up")
