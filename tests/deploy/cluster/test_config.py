"""cluster.toml: what it takes, what it refuses and in which words; what a box is told to run.

Planted faults seen red: see the tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tomli_w

from compute_node.boxes.workers_file import WorkersFile
from compute_node.config import ComputeNodeConfig
from compute_node.shadow.config import ShadowConfig
from compute_node.worker.config import WorkerConfig
from deploy.cli import run
from deploy.cluster import extra, report
from deploy.cluster.config import ClusterConfig
from deploy.cluster.order import Order
from deploy.settings import ServeSettings
from proto import errors
from tests.stack import ROOT

EXAMPLE = ROOT / "deploy/cluster/cluster.toml"
MIB = 2**20


def document(**changes: Any) -> dict[str, Any]:
    return {
        "model": "/stores/tiny",
        "ray": "127.0.0.2:6379",
        "main": {"host": "127.0.0.2", "memory": "2GiB"},
        "worker": [{"name": "w1", "host": "127.0.0.3", "memory": "1GiB"}],
    } | changes


def load(folder: Path, **changes: Any) -> ClusterConfig:
    file = folder / "cluster.toml"
    file.write_text(tomli_w.dumps(document(**changes)))
    return ClusterConfig.load(file)


def test_the_example_is_a_cluster() -> None:
    config = ClusterConfig.load(EXAMPLE)
    assert [box.name for box in config.boxes] == ["main", "kitchen", "cellar", "attic"]
    assert config.certs == EXAMPLE.parent / "certs"
    assert config.head_box.name == "main" and config.head_port == 6379


W1 = {"name": "w1", "host": "127.0.0.3", "memory": "1GiB"}
SHADOW = {"host": "127.0.0.4", "memory": "1GiB", "model": "small"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"wrokers": []}, "unknown key 'wrokers': remove it, or see deploy/cluster/cluster.toml"),
        ({"main": {"memory": "2GiB"}}, "key 'main.host' is missing"),
        ({"main": {"host": "127.0.0.1", "memory": "2GiB"}}, "write the one that other boxes reach"),
        ({"main": {"host": "box1", "memory": "2GiB"}}, "'box1'"),
        ({"worker": [W1 | {"memory": "lots"}]}, "'lots' is not a size"),
        ({"worker": [W1 | {"joules": 0}]}, "joules"),
        ({"worker": [W1 | {"tables": {"wroker": {}}}]}, "no daemon is called 'wroker'"),
        ({"worker": [W1, W1 | {"port": 9401}]}, "two boxes are called w1"),
        ({"worker": [W1, W1 | {"name": "w2"}]}, "two boxes listen at 127.0.0.3:9400"),
        ({"shadow": {"host": "127.0.0.4", "memory": "1GiB"}}, "key 'shadow.model' is missing"),
        ({"shadow": SHADOW | {"host": "127.0.0.3"}}, "two boxes listen at 127.0.0.3:9400"),
        ({"shadow": SHADOW | {"name": "w1"}}, "two boxes are called w1"),
        ({"shadow": SHADOW | {"joules": 2.0}}, "unknown key 'shadow.joules'"),
        ({"shadow": SHADOW | {"host": "10.0.0.4"}}, "10.0.0.4 is reachable from other hosts"),
        ({"worker": [W1 | {"host": "10.0.0.3"}]}, "10.0.0.3 is reachable from other hosts"),
        ({"worker": [W1 | {"store": "w9"}]}, "from w9, which has no store of the model: name one"),
        ({"worker": [W1 | {"store": "w1"}]}, "which has no store of the model: name one of main"),
        (
            {"worker": [W1 | {"store": "main", "model": "x"}]},
            "leave its model, source and share out",
        ),
        ({"ray": "somewhere"}, "write auto, local, or HOST:PORT"),
        ({"ray": "local", "insecure": True, "worker": [W1 | {"host": "10.0.0.3"}]}, "one machine"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigInvalid) as caught:
        load(tmp_path, **changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_head_that_is_no_box_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigInvalid, match="address of none of the boxes"):
        _ = load(tmp_path, ray="127.0.0.9:6379").head_box
    with pytest.raises(errors.ConfigInvalid, match="names no head"):
        _ = load(tmp_path, ray="auto").head_box


def test_ray_has_its_share_of_the_ceiling(tmp_path: Path) -> None:
    """Red when the daemons get the whole ceiling."""
    config = load(tmp_path)
    assert config.stack_memory_bytes(config.main) == (2048 - 448) * MIB
    assert config.stack_memory_bytes(config.workers[0]) == (1024 - 288) * MIB
    small = load(tmp_path, worker=[W1 | {"memory": "256MiB"}])
    with pytest.raises(errors.ConfigInvalid, match="box w1: of memory 256MiB Ray needs 288MiB"):
        small.stack_memory_bytes(small.workers[0])


def test_orders_are_settings_that_daemons_take(tmp_path: Path) -> None:
    worker = W1 | {"tables": {"worker": {"threads": 1}}, "joules": 2.0}
    config = load(tmp_path, certs="certs", worker=[worker])
    main, lent = (Order.of(config, box) for box in config.boxes)
    assert (main.verb, lent.verb) == ("serve", "worker")
    settings = ServeSettings.model_validate(lent.settings["serve"])
    assert settings.listen == "127.0.0.3:9400" and settings.memory == str(736 * MIB)
    assert lent.settings["worker"]["threads"] == 1
    tls = lent.settings["worker"]["tls"]
    assert tls["key"] == str(tmp_path.resolve() / "certs/w1.key")
    assert set(lent.settings["worker"]) <= set(WorkerConfig.model_fields)
    assert set(main.settings["compute_node"]) <= set(ComputeNodeConfig.model_fields)
    (tmp_path / "workers.toml").write_text(main.workers_text())
    file = WorkersFile.load(tmp_path / "workers.toml")
    [entry] = file.workers
    assert file.shadow is None
    assert (entry.address, entry.cost) == ("127.0.0.3:9400", 2.0)


def test_a_worker_without_a_store_borrows_from_the_box_it_names(tmp_path: Path) -> None:
    """Planted faults seen red: a lender that is not told to lend, a borrower with a model, one that
    is waited for before its lender starts.
    """
    w2 = W1 | {"name": "w2", "port": 9401, "store": "main"}
    config = load(tmp_path, certs="certs", worker=[W1, w2])
    main, lent, borrower = (Order.of(config, box) for box in config.boxes)
    assert main.settings["serve"]["lend"] == borrower.settings["serve"]["store"] == "127.0.0.2:9500"
    assert "lend" not in lent.settings["serve"] and "model" in lent.settings["serve"]
    assert "model" not in borrower.settings["serve"]
    assert main.settings["expert_store"]["tls"]["key"].endswith("certs/main.key")
    assert borrower.settings["worker"]["store_tls"]["key"].endswith("certs/w2.key")
    assert [[box.name for box in boxes] for boxes in config.starts] == [["w1"], ["main", "w2"]]
    settings = ServeSettings.model_validate(borrower.settings["serve"]).of_helper("worker")
    assert settings.borrows_from == "127.0.0.2:9500"
    assert set(borrower.settings["worker"]) <= set(WorkerConfig.model_fields)
    open_ = load(tmp_path, insecure=True, worker=[w2])
    main, borrower = (Order.of(open_, box) for box in open_.boxes)
    assert main.settings["expert_store"] == {"insecure": True}
    assert "store_tls" not in borrower.settings["worker"]


def test_a_shadow_is_started_as_a_worker_is_and_the_main_node_knows_it(tmp_path: Path) -> None:
    """Red when the main node's file lacks the address, its settings have it (a shadow that moves
    would restart it), or paths of a box start elsewhere.
    """
    config = load(tmp_path, certs="certs", shadow=SHADOW | {"port": 9401, "run_dir": "run"})
    main, _, shadow = (Order.of(config, box) for box in config.boxes)
    assert (shadow.name, shadow.verb) == ("shadow", "shadow")
    settings = ServeSettings.model_validate(shadow.settings["serve"])
    (tmp_path / "workers.toml").write_text(main.workers_text())
    file = WorkersFile.load(tmp_path / "workers.toml")
    assert settings.listen == "127.0.0.4:9401" == file.shadow_address
    assert settings.memory == str(736 * MIB)
    assert settings.model == tmp_path.resolve() / "small"
    assert shadow.run_dir == str(tmp_path.resolve() / "run")
    assert shadow.settings["shadow"]["tls"]["cert"].endswith("certs/shadow.pem")
    assert set(shadow.settings["shadow"]) <= set(ShadowConfig.model_fields)
    assert main.settings == Order.of(load(tmp_path, certs="certs"), config.main).settings


def test_status_shows_the_shadow_of_the_main_node(tmp_path: Path) -> None:
    of_node = {"boxes": {}, "shadow_nodes": {"127.0.0.4:9400": {"up": 1}, "old": {"up": 0}}}
    said = {"state": "serving", "reason": "", "status": json.dumps({"compute_node": of_node})}
    members = SimpleNamespace(report=lambda name: dict(said), kept=lambda: [])
    boxes = report.collect(load(tmp_path, shadow=SHADOW), cast(Any, members))
    assert list(boxes) == ["main", "w1", "shadow"]
    pages = report.pages(boxes)
    assert pages["main"]["shadow 127.0.0.4:9400"] == "follows"
    assert pages["main"]["shadow old"] == "away"
    assert pages["shadow"]["address"] == "127.0.0.4:9400"


def test_the_home_is_that_of_the_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order.of(load(tmp_path, model="~/stores/tiny"), load(tmp_path).main)
    monkeypatch.setenv("HOME", str(tmp_path / "elsewhere"))
    assert f'"{tmp_path}/elsewhere/.flashmoe/cluster/main"' in order.settings_text()


@pytest.mark.parametrize("verb", ["up", "status", "down", "head", "join", "certs"])
def test_without_the_extra_a_sentence_names_it(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extra, "find_spec", lambda name: None)
    more = ["--out", str(EXAMPLE.parent / "none")] if verb == "certs" else []
    assert run(["cluster", verb, str(EXAMPLE), *more]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and 'pip install "flashmoe[cluster]"' in said
