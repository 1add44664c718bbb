"""A worker that borrows from another box's store: it needs nothing of the checkpoint but what the
store says, and computes the bits of a box that has it.

Planted faults seen red: another model's experts computed with, a config that the store does not
send.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
import torch

from compute_node.boxes.work import Work
from compute_node.kernels.prober import Prober
from compute_node.model.loaded import load_experts
from compute_node.store.connect import connect_store
from compute_node.store.session import StoreDescription
from compute_node.worker.__main__ import new_cache
from compute_node.worker.checkpoint import check_model, checkpoint_folder
from compute_node.worker.config import WorkerConfig
from compute_node.worker.lent_experts import LentExperts
from proto import errors
from proto.rpc import TlsFiles
from tests.contract.test_exactness import engine
from tests.local_store import local_store

LAYER, EXPERTS = 3, [1, 4, 9, 30]


def config(folder: Path, **changes: object) -> WorkerConfig:
    settings = {
        "address": "unix:w",
        "store_address": f"unix:{folder}/store.sock",
        "session_dir": folder / "none",
        "transport": "chunks",
        "slots": 12,
        "deadline_s": 1.0,
    }
    return WorkerConfig.model_validate(settings | changes)


@contextmanager
def borrowing(settings: WorkerConfig) -> Iterator[LentExperts]:
    with closing(connect_store(settings)) as store:
        description = store.describe()
        cache = new_cache(settings, description, store)
        with checkpoint_folder(settings, description) as folder:
            loaded = load_experts(folder, description.spec, Prober())
        cache.open()
        yield LentExperts(loaded.kernels, description.spec.num_experts, cache, description.held)


def work(hidden_size: int, dtype: torch.dtype) -> Work:
    hidden = torch.randn(1, hidden_size).to(dtype)
    weights = torch.full((1, len(EXPERTS)), 1 / len(EXPERTS))
    return Work.of(LAYER, EXPERTS, hidden, torch.tensor([EXPERTS]), weights)


def test_it_computes_the_bits_of_a_box_with_a_store_while_there_is_one(
    tiny_store: Path, run_dir: Path
) -> None:
    lender = run_dir / "lender"
    lender.mkdir()
    with engine(tiny_store, run_dir) as node, ExitStack() as stack:
        loaded = node.loaded
        asked = work(loaded.hidden_size, loaded.dtype)
        here = LentExperts(loaded.kernels, loaded.spec.num_experts, node.cache).compute(asked)
        with local_store(tiny_store, lender, 6, lent_slots=2):
            lent = stack.enter_context(borrowing(config(lender)))
            assert torch.equal(lent.compute(asked), here)
            assert not (lender / "none").exists(), "it needs no lock"
        with pytest.raises(errors.StoreUnavailable, match=r"stayed away for 1 s"):
            lent.compute(asked)  # and the main node stands in
        with local_store(tiny_store, lender, 6, lent_slots=2):
            assert torch.equal(lent.compute(asked), here)


def test_what_it_was_not_planned_for_is_refused(tiny_store: Path, run_dir: Path) -> None:
    with local_store(tiny_store, run_dir, 6), closing(connect_store(config(run_dir))) as store:
        found = store.describe()
    check_model(config(run_dir, fingerprint=found.spec.fingerprint), found)
    with pytest.raises(errors.VersionMismatch, match="planned for other: start the worker again"):
        check_model(config(run_dir, fingerprint="other"), found)
    without = StoreDescription(
        found.spec, found.model_dir, found.slot_bytes, 6, 4, 4096, found.lease_bytes
    )
    with (
        pytest.raises(errors.ManifestInvalid, match=r"no config\.json of its model: set model_dir"),
        checkpoint_folder(config(run_dir), without),
    ):
        pass
    with checkpoint_folder(config(run_dir, model_dir=found.model_dir), without) as folder:
        assert folder == found.model_dir


def test_certificates_are_shown_to_the_store_alone() -> None:
    files = {"cert": "w.pem", "key": "w.key", "ca": "ca.pem"}
    settings = config(Path("x"), store_tls=files)
    assert settings.store_tls == TlsFiles.model_validate(files) and settings.tls is None
