"""The stacks of a box that lends experts to others, and of one that borrows them.

Planted faults seen red: the fixed parts of a store kept in a borrower's plan, lent slots beside the
ceiling, a face for others without `--lend`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.plan.parts import LENDING_BYTES
from deploy.settings import ServeSettings
from deploy.stack.launcher import commands
from deploy.stack.stack_plan import StackPlan
from deploy.stack.tables import compose
from expert_store.config import ExpertStoreConfig
from proto import errors
from proto.rpc import Listen
from tests.local_store import local_store
from tests.ports import free_port

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def lent_at(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, address = tmp_path_factory.mktemp("lend"), f"127.0.0.1:{free_port()}"
    with local_store(tiny_store, folder, 16, listen=address, lent_slots=4):
        yield address


def of_worker(run_dir: Path, **flags: object) -> ServeSettings:
    return ServeSettings().with_flags(run_dir=run_dir, **flags).of_helper("worker")


def test_a_worker_that_borrows_is_one_process_in_its_own_memory(
    lent_at: str, run_dir: Path
) -> None:
    plan = StackPlan.of(of_worker(run_dir, store=lent_at, memory="400MiB"))
    memory, run = plan.memory, plan.run_dir
    assert memory.total_bytes <= 400 * MIB and memory.shared_bytes == 0
    assert set(memory.parts) == {"prefill_buffers", "launcher", "worker", "experts"}
    tables = compose(run, plan.settings, plan.store_dir, plan.manifest, memory)
    assert list(tables) == list(commands(run, plan.settings)) == ["worker"]
    assert tables["worker"]["transport"] == "chunks"
    assert tables["worker"]["store_address"] == lent_at
    assert tables["worker"]["slots"] == memory.slots
    assert tables["worker"]["fingerprint"] == plan.manifest.spec.fingerprint
    with pytest.raises(errors.MemoryExceeded, match=r"the smallest that works is 3\d\d MiB"):
        StackPlan.of(of_worker(run_dir, store=lent_at, memory="200MiB"))


def test_a_box_that_lends_has_slots_for_it(tiny_store: Path, run_dir: Path) -> None:
    settings = ServeSettings(model=tiny_store, memory="700MiB", run_dir=run_dir)
    alone, lends = StackPlan.of(settings), StackPlan.of(settings.with_flags(lend="127.0.0.1:9500"))
    assert lends.memory.parts["lent_slots"] == 8 * lends.memory.slot_bytes
    assert lends.memory.parts["lending"] == LENDING_BYTES
    assert lends.memory.total_bytes <= 700 * MIB
    tables = compose(lends.run_dir, lends.settings, tiny_store, lends.manifest, lends.memory)
    config = ExpertStoreConfig.model_validate(tables["expert_store"])
    assert config.faces[1] == Listen("127.0.0.1:9500")
    assert config.num_slots == lends.memory.slots + lends.memory.spare_slots + 8
    assert config.lent_slots == 8
    assert "listen" not in compose(
        alone.run_dir, alone.settings, tiny_store, alone.manifest, alone.memory
    ).get("expert_store", {})


def test_what_contradicts_itself_is_refused(lent_at: str, tiny_store: Path, run_dir: Path) -> None:
    file = ServeSettings(model=tiny_store)
    with pytest.raises(errors.ConfigInvalid, match="give one of them"):
        ServeSettings().borrowing(lent_at, tiny_store)
    with pytest.raises(errors.ConfigInvalid, match="give one of them"):
        ServeSettings(model=tiny_store, store=lent_at).borrowing(None, None)
    assert file.borrowing(lent_at, None).model is None
    assert ServeSettings(store=lent_at).borrowing(None, tiny_store).store is None
    with pytest.raises(errors.ConfigInvalid, match="has no store to lend: leave --lend out"):
        StackPlan.of(of_worker(run_dir, store=lent_at, lend="127.0.0.1:1", memory="1GiB"))
    with pytest.raises(errors.ConfigInvalid, match=r"table \[worker\], store_tls: key 'key'"):
        _ = ServeSettings(worker={"store_tls": {"cert": "a"}}).store_tls
    with pytest.raises(errors.ConfigInvalid, match="deadline_s is 'long'"):
        _ = ServeSettings(worker={"deadline_s": "long"}).store_deadline_s
