"""What container-config writes for a box that helps a main node, and for a main node that has such
boxes: without an engine.
"""

from __future__ import annotations

import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import yaml

from compute_node.shadow.config import ShadowConfig
from compute_node.worker.config import WorkerConfig
from deploy.cli import run
from deploy.containers import compose_project, network
from deploy.containers.compose_project import BORROWER_FILE, COMPOSE_FILE, HELPER_FILE
from deploy.containers.memory_limits import STORE_ROOM_BYTES
from deploy.containers.network import INSIDE
from deploy.plan.parts import LENDING_BYTES
from deploy.settings import Role
from deploy.stack.run_dir import RunDir
from deploy.verbs.container_config import container_config
from expert_store.config import ExpertStoreConfig
from expert_store.manifest.manifest import Manifest
from proto import errors
from tests.certificates import files, issued
from tests.deploy.containers.test_compose import (
    HEALTHY_S,
    LocalContainers,
    Rendered,
    seconds,
    segment_bytes,
)
from tests.local_store import local_store
from tests.ports import free_port
from tests.stack import flashmoe, wait_for

pytestmark = pytest.mark.system

GIB, MIB = 1024**3, 1024**2
LISTEN = "10.0.0.2:9400"
HELPERS: tuple[Role, ...] = ("worker", "shadow")
CONFIGS = {"worker": WorkerConfig, "shadow": ShadowConfig}


@pytest.fixture
def settings(run_dir: Path) -> Path:
    """flashmoe.toml of a worker and of a shadow, and the certificates that it names."""
    paths = {}
    for name in ("cert", "key", "ca"):
        (run_dir / f"my {name}").write_text(f"{name} 1")
        paths[name] = str(run_dir / f"my {name}")
    tls = "{ " + ", ".join(f'{name} = "{path}"' for name, path in paths.items()) + " }"
    file = run_dir / "tls.toml"
    file.write_text(
        f"[worker]\ntls = {tls}\nstore_tls = {tls}\n[shadow]\ntls = {tls}\n"
        f"[expert_store]\ntls = {tls}\n"
    )
    return file


@pytest.mark.parametrize("role", HELPERS)
def test_a_helper_publishes_its_ports_at_one_address(
    role: Role, settings: Path, tiny_store: Path, run_dir: Path
) -> None:
    """Red for a port without its address, a store that has a network, and a limit that the plan
    does not have.
    """
    out = run_dir / "out"
    container_config(tiny_store, out=out, memory="1GiB", role=role, listen=LISTEN, config=settings)
    rendered = Rendered(out)
    store, helper = (rendered.services[name] for name in ("expert_store", "helper"))
    assert set(rendered.services) == {"expert_store", "helper"}
    assert store["network_mode"] == "none" and "ports" not in store
    ports = {"worker": "9400-9401", "shadow": "9400"}[role]
    assert helper["ports"] == [f"10.0.0.2:{ports}:{ports}"] and "network_mode" not in helper
    assert helper["command"][2] == f"compute_node.{role}"
    for service in (store, helper):
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
        assert int(service["memswap_limit"]) == int(service["mem_limit"])
        for mount in service["volumes"]:
            is_writable = mount["target"] == "/run/flashmoe" or service is store
            assert is_writable or mount["read_only"] is True, mount
    limits = [int(service["mem_limit"]) for service in (store, helper)]
    assert sum(limits) <= GIB
    assert limits[0] == segment_bytes(rendered) + STORE_ROOM_BYTES
    config = CONFIGS[role].load(out / "flashmoe.toml")
    assert config.listen == f"{INSIDE}:9400" and not config.insecure
    assert seconds(helper["stop_grace_period"]) >= config.stop_grace_s + 5


def test_limits_keep_a_ceiling_that_binds(tiny_store: Path, run_dir: Path) -> None:
    """Red when containers' room for health checks is not taken off a helper's plan."""
    container_config(tiny_store, out=run_dir / "out", memory="535MiB", role="worker")
    rendered = Rendered(run_dir / "out")
    limits = [int(service["mem_limit"]) for service in rendered.services.values()]
    assert 530 * MIB < sum(limits) <= 535 * MIB
    assert WorkerConfig.load(rendered.out / "flashmoe.toml").slots < 256


def test_certificates_go_where_containers_read_them_and_are_renewed_alone(
    settings: Path, tiny_store: Path, run_dir: Path
) -> None:
    """Red for a key that others read, a path of the box in the daemon's table, and certificates
    whose renewal makes the containers anew.
    """

    def configure() -> Rendered:
        flags: Any = {"role": "worker", "listen": LISTEN, "config": settings}
        container_config(tiny_store, out=run_dir / "out", memory="1GiB", **flags)
        return Rendered(run_dir / "out")

    first = configure()
    tls = WorkerConfig.load(first.out / "flashmoe.toml").tls
    assert tls is not None and tls.ca is not None
    for name, inside in (("cert", tls.cert), ("key", tls.key), ("ca", tls.ca)):
        assert inside.parent == Path("/run/flashmoe")
        copied = first.run_dir / inside.name
        assert copied.read_text() == f"{name} 1" and stat.S_IMODE(copied.stat().st_mode) == 0o600
        assert copied.stat().st_uid == int(first.env["FLASHMOE_UID"])
    (run_dir / "my key").write_text("key 2")
    assert configure().env == first.env
    assert (first.run_dir / tls.key.name).read_text() == "key 2"
    (run_dir / "my key").unlink()
    with pytest.raises(errors.ConfigInvalid, match=r"cannot read .*my key: No such file"):
        configure()


def test_a_port_of_this_host_alone_needs_no_certificate(tiny_store: Path, run_dir: Path) -> None:
    """Red when what the engine publishes on loopback is refused by the daemon, which does not see
    that.
    """
    container_config(tiny_store, out=run_dir / "out", memory="1GiB", role="worker")
    rendered = Rendered(run_dir / "out")
    assert rendered.services["helper"]["ports"] == ["127.0.0.1:9400-9401:9400-9401"]
    assert WorkerConfig.load(rendered.out / "flashmoe.toml").insecure is True


def test_a_main_node_has_a_network_where_it_has_boxes(tiny_store: Path, run_dir: Path) -> None:
    """Red for a network without a box to call, for a port of a main node, and for addresses that
    its table lacks.
    """

    def node(**flags: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        container_config(tiny_store, out=run_dir / "out", memory="1GiB", **flags)
        table = tomllib.loads((run_dir / "out/flashmoe.toml").read_text())["compute_node"]
        return Rendered(run_dir / "out").services, table

    alone, _ = node()
    assert {service["network_mode"] for service in alone.values()} == {"none"}
    for flags in ({"worker": [LISTEN]}, {"shadow": LISTEN}):
        services, table = node(**flags)
        modes = {name: service["network_mode"] for name, service in services.items()}
        assert modes.pop("compute_node") == "bridge" and set(modes.values()) == {"none"}
        assert not any("ports" in service for service in services.values())
        assert (table["workers"] == [LISTEN]) is ("worker" in flags)
        assert (table.get("shadow_address") == LISTEN) is ("shadow" in flags)


@pytest.mark.parametrize("role", ["main", "worker"])
def test_a_box_that_lends_publishes_its_store(
    role: Role, settings: Path, tiny_store: Path, run_dir: Path
) -> None:
    """Red for a store without a network, a limit that the slots for others are not in, a file that
    stays when the box lends no more, and a command that does not read it.
    """
    out = run_dir / "out"

    def configure(**flags: Any) -> dict[str, Any]:
        flags |= {"role": role, "config": settings}
        container_config(tiny_store, out=out, memory="1GiB", **flags)
        return Rendered(out).services["expert_store"]

    alone = configure()
    assert "ports" not in alone and str(out) in compose_project.command(out)
    lends = configure(lend="10.0.0.2:9500")
    assert lends["network_mode"] == "bridge" and lends["ports"] == ["10.0.0.2:9500:9500"]
    assert {**lends, "network_mode": "none"}.keys() - {"ports"} == alone.keys()
    config = ExpertStoreConfig.load(out / "flashmoe.toml")
    assert config.listen == f"{INSIDE}:9500" and not config.insecure and config.lent_slots == 8
    assert config.tls is not None and config.tls.key.parent == Path("/run/flashmoe")
    own = RunDir(Rendered(out).run_dir).path / config.tls.key.name
    assert own.read_text() == "key 1" and stat.S_IMODE(own.stat().st_mode) == 0o600
    rendered = Rendered(out)
    limit = int(rendered.services["expert_store"]["mem_limit"])
    assert limit == segment_bytes(rendered) + STORE_ROOM_BYTES + LENDING_BYTES
    assert compose_project.command(out).endswith(str(out / "docker-compose.lending.yml"))
    assert configure() == alone and not (out / "docker-compose.lending.yml").exists()


def test_a_worker_without_a_store_is_one_container(
    tiny_store: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red for the mounts of a store, a network that reaches nobody, and experts that its own
    limit does not hold.
    """
    monkeypatch.setattr(network, "check_found", lambda address: None)  # here it is on loopback
    address, out = f"127.0.0.1:{free_port()}", run_dir / "out"
    issued(run_dir / "certs", "main", "w1")
    shown = {name: str(path) for name, path in files(run_dir / "certs", "w1")}
    settings = run_dir / "tls.toml"
    settings.write_text(tomli_w.dumps({"worker": {"tls": shown, "store_tls": shown}}))
    lends: Any = {"listen": address, "lent_slots": 4, "tls": files(run_dir / "certs", "main")}
    (run_dir / "lend").mkdir()
    limits = []
    flags: Any = {"role": "worker", "lent_store": address, "listen": LISTEN, "config": settings}
    with local_store(tiny_store, run_dir / "lend", 16, **lends):
        for experts_memory in ("25%", "100%"):
            container_config(out=out, memory="500MiB", experts_memory=experts_memory, **flags)
            limits.append(int(Rendered(out).services["helper"]["mem_limit"]))
    rendered = Rendered(out)
    assert rendered.services.keys() == {"helper"}
    helper = rendered.services["helper"]
    assert {mount["target"] for mount in helper["volumes"]} == {
        "/run/flashmoe",
        "/etc/flashmoe.toml",
    }
    assert helper["ports"] == ["10.0.0.2:9400-9401:9400-9401"]
    networks = yaml.safe_load((out / "docker-compose.yml").read_text())["networks"]
    assert networks == {name: {} for name in helper["networks"]}
    config = WorkerConfig.load(out / "flashmoe.toml")
    assert (config.store_address, config.transport) == (address, "chunks")
    assert config.store_tls is not None and config.store_tls.ca == Path(
        "/run/flashmoe/worker.store_tls.ca.pem"
    )
    assert limits[1] - limits[0] == 192 * Manifest.load(tiny_store).slot_bytes
    assert limits[1] <= 500 * MIB and config.slots == 256


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lend", "10.0.0.2:9500"], "reachable from other hosts: set tls, or insec"),
        (["--lend", "box2:9500"], "--lend box2:9500: an engine publishes on an IP address"),
        (["--role", "shadow", "--lend", "10.0.0.2:9500"], "--lend is not for --role shadow"),
        (["--store", "10.0.0.2:9500"], "--store is not for --role main"),
        (["--role", "worker", "--store", "10.0.0.2:9500"], "give one of them"),
        (["--role", "worker", "--listen", LISTEN], "reachable from other hosts: set tls, or insec"),
        (["--role", "worker", "--listen", "box2:9400"], "publishes on an IP address"),
        (["--role", "worker", "--listen", "127.0.0.1:65535"], "needs the next port, too"),
        (["--role", "shadow", "--listen", "127.0.0.1:0"], "need to know the port"),
        (["--role", "worker", "--http", "8000"], "--http is not for --role worker"),
        (["--role", "shadow", "--worker", LISTEN], "--worker is not for --role shadow"),
        (["--listen", LISTEN], "--listen is not for --role main"),
        (["--worker", "127.0.0.1:9400"], "127.0.0.1:9400 is not seen by containers"),
        (["--shadow", "localhost:9400"], "localhost:9400 is not seen by containers"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    flags: list[str],
    said: str,
    tiny_store: Path,
    run_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = str(run_dir / "out")
    assert run(["container-config", str(tiny_store), "--memory", "1GiB", "--out", out, *flags]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1
    assert not (run_dir / "out").exists()


@pytest.mark.parametrize("role", HELPERS)
def test_a_ceiling_that_cannot_hold_is_refused(role: Role, tiny_store: Path, run_dir: Path) -> None:
    """Red when a helper's refusal speaks of Valkey, or containers' room is not taken off."""
    with pytest.raises(errors.MemoryExceeded, match=r"containers need .* for health checks\)"):
        container_config(tiny_store, out=run_dir / "out", memory="480MiB", role=role)


def test_both_files_say_the_same_of_what_both_have() -> None:
    """Red when a hardening, a mount or the store's service is changed in one of them."""
    main, helper, borrower = (
        yaml.safe_load(file.read_text()) for file in (COMPOSE_FILE, HELPER_FILE, BORROWER_FILE)
    )
    assert helper["services"]["expert_store"] == main["services"]["expert_store"]
    assert helper["volumes"]["segment"] == main["volumes"]["segment"]
    shared = {name for name in helper if name.startswith("x-")}
    assert shared == {name for name in main if name.startswith("x-")}
    for name in shared:
        assert {"network_mode": "none"} | helper[name] == {"network_mode": "none"} | main[name]
        assert borrower.get(name, helper[name]) == helper[name]
    own, without = helper["services"]["helper"], borrower["services"]["helper"]
    assert own.keys() - {"depends_on"} == without.keys()
    alike = without.keys() - {"volumes", "healthcheck"}
    assert {name: own[name] for name in alike} == {name: without[name] for name in alike}


@pytest.fixture(params=HELPERS)
def containers(
    request: pytest.FixtureRequest, tiny_store: Path, run_dir: Path
) -> Iterator[LocalContainers]:
    out = run_dir / "out"
    container_config(tiny_store, out=out, memory="1GiB", role=request.param)
    config = out / "flashmoe.toml"  # processes share the ports of this machine
    config.write_text(
        config.read_text()
        .replace(f"{INSIDE}:9400", f"127.0.0.1:{free_port()}")
        .replace("direct_port = 9401", f"direct_port = {free_port()}")
    )
    started = LocalContainers(Rendered(out), run_dir)
    yield started
    started.kill()


@pytest.mark.timeout(900)
def test_a_helper_starts_serves_and_stops(containers: LocalContainers, run_dir: Path) -> None:
    """Red for a misspelt module or socket, and for a wait for daemons that a helper has not."""
    for name in ("expert_store", "helper"):
        assert not containers.is_healthy(name)
        containers.start(name)
        log = containers.log(name)
        wait_for(lambda name=name: containers.is_healthy(name), HEALTHY_S, f"{name}: {log}")
    done = flashmoe("container-wait", str(run_dir / "out"))
    assert done.returncode == 0 and done.stdout.startswith("flashmoe status --run-dir"), done.stderr
    assert flashmoe("status", "--run-dir", str(run_dir / "out/run")).returncode == 0
    for name in ("helper", "expert_store"):
        assert containers.stop(name) == 0, containers.log(name).read_text()[-2000:]
    assert list(containers.segment_dir.iterdir()) == []
