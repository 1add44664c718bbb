"""A store with a share says what it has, lends that, and names what it has not.

Written against: an expert that is elsewhere called unknown, a description without what is
held, a list of residents that is read though some are elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from compute_node.store.borrow import StoreClient
from expert_store.manifest.manifest import Manifest
from expert_store.manifest.share import Share
from proto import errors
from proto.expert import RecordKey
from tests.expert_store.conftest import NUM_SLOTS
from tests.expert_store.raw_session import Lock, Wire, outcome, until
from tests.expert_store.stores import KEYS, write_store
from tests.local_store import local_store

HERE, ELSEWHERE = RecordKey.exact(1, 2), RecordKey.exact(1, 4)


@pytest.fixture
def part(run_dir: Path) -> Manifest:
    whole, share = write_store(run_dir / "store"), Share(2, 3)
    experts = share.experts(whole.spec)
    records = {key: one for key, one in whole.records.items() if key.expert in experts}
    part = replace(whole, records=records, share=share)
    part.write(run_dir / "store")
    listed = [[key.expert.layer, key.expert.expert] for key in (ELSEWHERE, HERE)]
    document = {"fingerprint": part.spec.fingerprint, "experts": listed}
    (run_dir / "resident.json").write_text(json.dumps(document))
    return part


@pytest.fixture
def wire(part: Manifest, run_dir: Path) -> Iterator[Wire]:
    kept = run_dir / "resident.json"
    with (
        local_store(
            run_dir / "store", run_dir, NUM_SLOTS, lock_poll_s=0.01, resident_list=kept
        ) as address,
        Wire(address, run_dir) as wire,
    ):
        yield wire


def test_what_it_has_is_lent_and_the_rest_is_named(
    wire: Wire, part: Manifest, run_dir: Path
) -> None:
    until(lambda: wire.stats().slots_reclaimable == 1, "what was resident and is here")
    client = StoreClient(f"unix:{run_dir}/store.sock", "n", 4, None, 10.0)
    found = client.describe()
    client.close()
    assert found.held == part.held and found.num_experts == len(part.records) < len(KEYS)
    with pytest.raises(errors.ManifestInvalid, match="has 5 of 12 experts: give a store"):
        found.check_whole()
    for acquires, prefetches in (([ELSEWHERE], []), ([HERE], [ELSEWHERE])):
        with Lock(wire.session_dir, "a.lock") as lock:
            session, _ = wire.open_shared(lock)
            with pytest.raises(errors.ExpertElsewhere, match="share 2 of 3 and has no expert L01"):
                session.exchange(acquires, prefetches=prefetches)
                session.next()
            assert outcome(session) is not None
    with Lock(wire.session_dir, "b.lock") as lock:
        session, _ = wire.open_shared(lock)
        [lease] = session.exchange([HERE])
        assert not lease.HasField("error")
        session.finish()
        assert outcome(session) is None
