"""A worker's stack: a store and a worker, whatever the file says for a main node.

Planted faults seen red: a gateway beside the worker because the file has http, a main node that
becomes a worker because the file has listen, the room of a main node's parts kept.
"""

from __future__ import annotations

from pathlib import Path

from deploy.settings import ServeSettings
from deploy.stack.launcher import commands
from deploy.stack.stack_plan import StackPlan
from deploy.stack.tables import compose

FILE = """
[serve]
http = "127.0.0.1:0"
listen = "127.0.0.1:9777"
workers = ["10.0.0.2:9400"]
experts_memory = "50%"
"""


def started(settings: ServeSettings) -> tuple[StackPlan, dict[str, dict[str, object]], set[str]]:
    plan = StackPlan.of(settings)
    run = plan.run_dir
    tables = compose(run, plan.settings, plan.store_dir, plan.manifest, plan.memory)
    return plan, tables, {*commands(run, plan.settings)}


def test_one_file_serves_a_main_node_and_a_worker(tiny_store: Path, tmp_path: Path) -> None:
    (tmp_path / "flashmoe.toml").write_text(FILE)
    settings = ServeSettings.load(tmp_path / "flashmoe.toml").with_flags(
        model=tiny_store, run_dir=tmp_path / "run"
    )
    main, main_tables, processes = started(settings)
    assert processes == {"valkey", "expert_store", "compute_node", "scheduler", "gateway"}
    assert main_tables["compute_node"]["workers"] == ["10.0.0.2:9400"]
    worker, tables, processes = started(settings.of_helper("worker"))
    assert processes == set(tables) == {"expert_store", "worker"}
    assert tables["worker"]["listen"] == "127.0.0.1:9777"
    assert tables["worker"]["slots"] == worker.memory.slots == main.memory.slots
    assert {"dense_weights", "kv_cache", "scheduler", "valkey"}.isdisjoint(worker.memory.parts)
    assert worker.memory.total_bytes < main.memory.total_bytes - 200 * 2**20
