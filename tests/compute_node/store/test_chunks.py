"""Experts of a store on another host: a node holds more of them than the store has room for, keeps
no second copy of what travels, and computes with nothing that arrived damaged.

Planted faults seen red: a quota as large as what the node holds, chunks kept until somebody waits
for them, a checksum not compared, a session of another model opened, slots in shared pages.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.store.borrow import StoreClient
from compute_node.store.memory import Borrowed, PrivateMemory
from deploy.stack.memory import anonymous_bytes
from expert_store.face import service
from expert_store.manifest.extents import ExpertRecord
from proto import errors
from proto import expert_store_pb2 as pb
from proto.expert import ExpertKey, RecordKey
from tests.expert_store.stores import KEYS, LAYOUT, NUM_EXPERTS, expert_bytes, write_store
from tests.fakes import make_capacity
from tests.local_store import local_store
from tests.stack import wait_for

LENT, SPARE = 2, 2


@pytest.fixture
def store_dir(run_dir: Path) -> Path:
    write_store(run_dir / "store")
    return run_dir / "store"


@contextmanager
def lending(store_dir: Path, run_dir: Path) -> Iterator[str]:
    """A store with room for one node of its own box, and for what is on its way."""
    num_slots = 1 + LENT + SPARE
    settings = {"spare_slots": SPARE, "lent_slots": LENT, "lock_poll_s": 0.01}
    with local_store(store_dir, run_dir, num_slots, **settings) as address:
        yield address


@contextmanager
def borrower(address: str, deadline_s: float = 20.0) -> Iterator[StoreClient]:
    with closing(StoreClient(address, "far", len(KEYS), None, deadline_s)) as client:
        yield client


def bytes_of(borrowed: Borrowed) -> bytes:
    return b"".join(bytes(t.contiguous().view(-1).numpy()) for t in borrowed.tensors.values())


def test_a_node_holds_more_than_the_store_lends_at_once(store_dir: Path, run_dir: Path) -> None:
    with lending(store_dir, run_dir) as address, borrower(address) as client:
        client.open()
        held = client.exchange([], KEYS)
        assert {one.record: bytes_of(one) for one in held} == {
            key: expert_bytes(store_dir, key) for key in KEYS
        }
        again = client.exchange(KEYS[:3], KEYS[:2])  # in the slots of those given back
        assert [bytes_of(one) for one in again] == [expert_bytes(store_dir, k) for k in KEYS[:2]]


def test_nodes_of_the_store_s_own_box_have_their_slots(store_dir: Path, run_dir: Path) -> None:
    with lending(store_dir, run_dir) as address, borrower(address) as client:
        client.open()
        with closing(StoreClient(address, "near", 1, run_dir / "sessions", 20.0)) as near:
            near.open()
            with closing(StoreClient(address, "third", 1, None, 0.2)) as third:
                third.describe()
                with pytest.raises(errors.SlotsExhausted):
                    third.open()


def test_what_arrives_waits_in_its_slot(
    store_dir: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what a node has asked for takes no memory beside its slots."""
    placed, by = [], set()
    place = PrivateMemory.add_chunk

    def add_chunk(self: PrivateMemory, key: RecordKey, *rest: object) -> None:
        place(self, key, *rest)  # type: ignore[arg-type]
        placed.append(key)
        by.add(threading.current_thread())

    monkeypatch.setattr(PrivateMemory, "add_chunk", add_chunk)
    with lending(store_dir, run_dir) as address, borrower(address) as client:
        client.open()
        arrivals = client.borrow([], KEYS)
        wait_for(lambda: len(set(placed)) == len(KEYS), 20, "all to be in their slots")
        assert threading.current_thread() not in by
        assert len([one for part in arrivals for one in part]) == len(KEYS)


def test_slots_of_a_node_s_own_are_measured_as_its_memory() -> None:
    before, slot_bytes = anonymous_bytes(os.getpid()), 32 << 20
    memory = PrivateMemory(1, slot_bytes)
    memory.add_chunk(KEYS[0], 0, b"x" * slot_bytes, None)
    assert anonymous_bytes(os.getpid()) - before > 0.9 * slot_bytes
    assert memory.tensors(0, 0, [0], LAYOUT[:1])  # still there


def test_what_is_damaged_on_its_way_is_refused(
    store_dir: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, damaged = service.chunks_of, KEYS[4]

    def chunks_of(record: ExpertRecord, view: memoryview) -> Iterator[pb.Chunk]:
        for chunk in whole(record, view):
            if record.key == damaged:
                chunk.data = bytes([chunk.data[0] ^ 1]) + chunk.data[1:]
            yield chunk

    monkeypatch.setattr(service, "chunks_of", chunks_of)
    with lending(store_dir, run_dir) as address, borrower(address) as client:
        client.open()
        with pytest.raises(errors.WeightsDamaged, match=rf"{damaged} was damaged on its way"):
            client.exchange([], KEYS[3:6])
        assert not client.is_open, "nothing of it is computed with"
        client.open()
        [sound] = client.exchange([], [KEYS[3]])
        assert bytes_of(sound) == expert_bytes(store_dir, KEYS[3])


def test_a_store_that_comes_back_lends_again_and_one_of_another_model_does_not(
    store_dir: Path, run_dir: Path
) -> None:
    with borrower(f"unix:{run_dir}/store.sock") as client:
        with lending(store_dir, run_dir):
            client.open()
            client.exchange([], KEYS[:2])
        wait_for(lambda: not client.is_open, 20, "the session to be lost")
        with lending(store_dir, run_dir):
            client.open()
            [found] = client.exchange([], [KEYS[1]])
            assert bytes_of(found) == expert_bytes(store_dir, KEYS[1])
        write_store(store_dir, seed=1)
        with (
            lending(store_dir, run_dir),
            pytest.raises(errors.VersionMismatch, match="the store serves model"),
        ):
            client.open()


def test_nothing_travels_that_no_step_asked_for(store_dir: Path, run_dir: Path) -> None:
    """Neither at the start nor ahead."""
    layers = (1, 3)
    with lending(store_dir, run_dir) as address, borrower(address) as client:
        client.open()
        client.exchange([], KEYS[:3])  # in the store's memory
        chooser = PolicyChooser("lru", 16.0, layers, NUM_EXPERTS, lambda: None)
        cache = ExpertCache(client, make_capacity(4, layers, 2, pooled=True), chooser)
        cache.open()
        assert len(cache) == 0
        assert list(cache.read_ahead(1, [ExpertKey(1, 5)], [], 1)) == []
        assert compute(cache, 1, [0, 4]) == {0, 4}
        assert RecordKey.exact(1, 5) not in client.resident()


def compute(cache: ExpertCache, layer: int, experts: Sequence[int]) -> set[int]:
    _, waves = cache.step(layer, experts)
    return {one.key.expert for wave in waves for one in wave}
