"""Three boxes in a real container engine: a worker and a shadow by docker-compose.helper.yml, and a
main node that has them, with certificates on all ways between them; and a worker that borrows the
main node's experts.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w

from compute_node.client.node_client import NodeClient
from expert_store.offline.pack import pack
from tests.certificates import files, issued, serial_shown
from tests.container.test_containers import (
    MEMORY_BYTES,
    PROMPT,
    Containers,
    by_our_compose,
    peak_bytes,
)
from tests.ports import free_port
from tests.stack import MODEL, ROOT, flashmoe, wait_for

pytestmark = [pytest.mark.container, pytest.mark.timeout(900)]

STORE = ROOT / ".flashmoe/tiny-moe"
TABLES = {
    "worker": [("worker", "tls"), ("worker", "store_tls")],
    "shadow": [("shadow", "tls")],
    "main": [("compute_node", "worker_tls"), ("expert_store", "tls")],
}
HELPERS = ("worker", "shadow")


@dataclass
class Boxes:
    """host: the address at which helpers are published, which containers reach too"""

    folder: Path
    host: str
    certs: Path

    def containers(self, name: str) -> Containers:
        return Containers(self.folder / name)

    def configure(self, name: str, store: Path | None, *flags: str) -> str:
        """Returns the command that starts it."""
        tls, document = files(self.certs, name).model_dump(mode="json"), dict[str, Any]()
        for table, key in TABLES[name]:
            document.setdefault(table, {})[key] = tls
        settings = self.folder / f"{name}.toml"
        settings.write_text(tomli_w.dumps(document))
        out = ("--out", str(self.folder / name), "--config", str(settings), "--memory", "1GiB")
        own = [] if store is None else [str(store)]
        done = flashmoe("container-config", *own, *out, *flags)
        assert done.returncode == 0, done.stderr
        return by_our_compose(done.stdout)

    def up(self, name: str, store: Path | None, *flags: str) -> Containers:
        command = self.configure(name, store, *flags)
        subprocess.run(command, shell=True, check=True, capture_output=True)
        self.containers(name).wait()
        return self.containers(name)


@pytest.fixture(scope="module")
def boxes(image: str, tmp_path_factory: pytest.TempPathFactory) -> Boxes:
    folder = tmp_path_factory.mktemp("b")
    host = address_of_this_box()
    authority = issued(folder / "certs")
    for name in TABLES:
        authority.issue(folder / "certs", name, [host])
    return Boxes(folder, host, folder / "certs")


def address_of_this_box() -> str:
    """The one from which it would call others; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address beside loopback")
        return str(probe.getsockname()[0])


@contextmanager
def down_at_last(containers: Containers) -> Iterator[None]:
    try:
        yield
    finally:
        if (containers.out / "compose.env").exists():
            containers.check_down()


def test_a_worker_and_a_shadow_help_a_main_node(boxes: Boxes, tmp_path: Path) -> None:
    """Red for a main node without a network, a port at another address, a mount that lacks what a
    worker or shadow reads, certificates that their user cannot read, and room in limits for less
    than they use.
    """
    pack(MODEL, tmp_path / "int8", weight_format="int8")
    tmp_path.chmod(0o755)
    at = {name: f"{boxes.host}:{free_port()}" for name in HELPERS}
    with ExitStack() as stack:
        for name in TABLES:
            stack.enter_context(down_at_last(boxes.containers(name)))
        alone = boxes.up("main", STORE, "--experts-memory", "25%")
        expected = alone.tokens()
        worker = boxes.up("worker", STORE, "--role", "worker", "--listen", at["worker"])
        boxes.up("shadow", tmp_path / "int8", "--role", "shadow", "--listen", at["shadow"])
        helped = ("--worker", at["worker"], "--shadow", at["shadow"])
        main = boxes.up("main", STORE, "--experts-memory", "25%", *helped)
        wait_for(lambda: _is_helped(main, at), 60, "the worker to be given work")
        assert main.tokens() == expected
        node = main.status()["compute_node"]
        assert node["boxes"][at["worker"]]["answered"] > 0, node["boxes"]
        shadow = node["shadow_nodes"][at["shadow"]]
        assert shadow["named"] + shadow["named_late"] + shadow["unheard"] > 0
        check_reach(boxes, at)
        check_limits(boxes)
        before = worker.id("helper")
        check_renewal(boxes, at["worker"])
        restarts = worker.inspect("helper")["RestartCount"]
        with main.client() as client:
            pieces = iter(answer := client.generate(PROMPT, max_tokens=64, ignore_eos=True))
            next(pieces)
            worker.kill("helper")
            list(pieces)
        assert answer.run().token_ids == expected
        wait_for(lambda: worker.inspect("helper")["RestartCount"] > restarts, 60, "the engine")
        wait_for(lambda: _is_helped(main, at), 120, "the worker to be given work again")
        assert main.tokens() == expected and worker.id("helper") == before


def test_a_worker_borrows_experts_of_a_main_node(boxes: Boxes) -> None:
    """Red for a store that is not published, a worker that does not reach it, certificates that
    either lacks, and a limit without room for the experts that it holds.
    """
    lent, at = (f"{boxes.host}:{free_port(boxes.host)}" for _ in range(2))
    with ExitStack() as stack:
        for name in ("worker", "main"):
            stack.enter_context(down_at_last(boxes.containers(name)))
        flags = ("--experts-memory", "25%", "--lend", lent)
        alone = boxes.up("main", STORE, *flags)
        expected = alone.tokens()
        published = alone.inspect("expert_store")["HostConfig"]["PortBindings"]
        port = lent.rpartition(":")[2]
        assert published == {f"{port}/tcp": [{"HostIp": boxes.host, "HostPort": port}]}
        borrows = ("--role", "worker", "--store", lent, "--listen", at)
        worker = boxes.up("worker", None, *borrows)
        main = boxes.up("main", STORE, *flags, "--worker", at)

        def is_up() -> bool:
            with NodeClient(main.run.address("compute_node")) as client:
                return bool(client.stats().of(box=at).up)

        wait_for(is_up, 60, "the worker to be given work")
        assert main.tokens() == expected
        assert main.status()["compute_node"]["boxes"][at]["answered"] > 0
        state = worker.inspect("helper")
        assert not state["State"]["OOMKilled"] and state["RestartCount"] == 0
        assert peak_bytes(worker.id("helper")) <= state["HostConfig"]["Memory"] <= MEMORY_BYTES


def _is_helped(main: Containers, at: dict[str, str]) -> bool:
    with NodeClient(main.run.address("compute_node")) as client:
        stats = client.stats()
        return bool(stats.of(box=at["worker"]).up and stats.of(shadow=at["shadow"]).up)


def check_reach(boxes: Boxes, at: dict[str, str]) -> None:
    """Each port at its address alone; nothing else of any box."""
    ports = {int(address.rpartition(":")[2]) for address in at.values()}
    listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.laddr.port in ports}
    assert listening == {boxes.host}
    for name in HELPERS:
        published = boxes.containers(name).inspect("helper")["HostConfig"]["PortBindings"]
        first = int(at[name].rpartition(":")[2])
        ports = map(str, (first, first + 1) if name == "worker" else (first,))
        expected = {f"{one}/tcp": [{"HostIp": boxes.host, "HostPort": one}] for one in ports}
        assert published == expected
        assert _network(boxes.containers(name), "expert_store") == "none"
    for service in ("valkey", "expert_store", "scheduler"):
        assert _network(boxes.containers("main"), service) == "none"
    assert not boxes.containers("main").inspect("compute_node")["HostConfig"]["PortBindings"]


def _network(containers: Containers, service: str) -> str:
    return str(containers.inspect(service)["HostConfig"]["NetworkMode"])


def check_limits(boxes: Boxes) -> None:
    for name in HELPERS:
        states: dict[str, Any] = {
            service: boxes.containers(name).inspect(service)
            for service in ("expert_store", "helper")
        }
        assert sum(state["HostConfig"]["Memory"] for state in states.values()) <= MEMORY_BYTES
        for service, state in states.items():
            assert not state["State"]["OOMKilled"]
            used_bytes = peak_bytes(boxes.containers(name).id(service))
            assert used_bytes <= state["HostConfig"]["Memory"]


def check_renewal(boxes: Boxes, address: str) -> None:
    """The next connection sees the new certificate; no container is made anew."""
    own = files(boxes.certs, "main")
    before = serial_shown(address, own)
    issued(boxes.certs).issue(boxes.certs, "worker", [boxes.host])
    command = boxes.configure("worker", STORE, "--role", "worker", "--listen", address)
    subprocess.run(command, shell=True, check=True, capture_output=True)
    wait_for(lambda: serial_shown(address, own) != before, 30, "the new certificate")
