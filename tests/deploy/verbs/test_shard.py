"""The verb that makes shares: what it says, and what it refuses in one sentence.

Written against: a share's experts counted as all of the model's.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.plan.mebibytes import MIB
from deploy.settings import ServeSettings
from deploy.stack.stack_plan import StackPlan
from expert_store.manifest.manifest import Manifest
from expert_store.manifest.share import Share
from expert_store.offline.shard import shard
from proto import errors
from tests.stack import flashmoe


def test_a_share_is_made_verified_and_planned_for(tiny_store: Path, tmp_path: Path) -> None:
    target = tmp_path / "share"
    made = flashmoe("shard", str(tiny_store), "--owner", "2/3", "--out", str(target))
    assert made.returncode == 0, made.stderr
    assert "share 2 of 3, 87 of 256 experts, 12.2 MiB of experts" in made.stdout
    verified = flashmoe("verify", str(target))
    assert verified.returncode == 0 and "is as it was indexed" in verified.stdout
    manifest = Manifest.load(target)
    settings = ServeSettings().with_flags(model=target, experts_memory="100%", run_dir=tmp_path)
    memory = StackPlan.of(settings.of_helper("worker")).memory
    assert memory.slots == memory.num_experts == len(manifest.records) == 87
    assert memory.parts["experts"] == 87 * manifest.slot_bytes < 16 * MIB


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--owner", "4/3"], "--owner '4/3' names no share"),
        (["--owner", "1/33"], "33 shares of 32 experts a layer: make at most 32"),
        (["--owner", "1/3", "--copies", "4"], "4 copies of 3 shares: give 1 to 3"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(
    flags: list[str], reason: str, tiny_store: Path, tmp_path: Path
) -> None:
    found = flashmoe("shard", str(tiny_store), *flags, "--out", str(tmp_path / "share"))
    assert found.returncode == 2
    assert reason in " ".join(found.stderr.split())
    assert not list(tmp_path.iterdir())


def test_where_all_experts_are_needed_a_share_is_refused(tiny_store: Path, tmp_path: Path) -> None:
    """Written against: a main node that starts, and asks its store for what it lacks."""
    store = tmp_path / "share"
    shard(tiny_store, Share(1, 3), store)
    reason = "share 1 of 3, with 86 of 256 experts: give a store that has all"
    settings = ServeSettings().with_flags(model=store, memory="4GiB", run_dir=tmp_path)
    for one in (settings, settings.of_helper("shadow")):
        with pytest.raises(errors.ManifestInvalid, match=reason):
            StackPlan.of(one)
    served = StackPlan.of(settings.with_flags(workers=("10.0.0.2:9400",)))
    assert served.memory.num_experts == served.memory.slots == 86, "workers have the rest"
    for arguments in (["serve", "--model", str(store)], ["plan", str(store)]):
        found = flashmoe(*arguments, "--memory", "4GiB")
        assert found.returncode == 2 and reason in " ".join(found.stderr.split())
