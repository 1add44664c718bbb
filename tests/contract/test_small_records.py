"""A token that allows small records gets what a store of nothing else gives it, and leaves exact
sequences on the same node their bits.

Planted faults seen red: a small record taken for an exact one, both computed by one kernel, an
exact record that is resident not preferred, an exact miss that keeps its small record.
"""

from __future__ import annotations

import random
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compute_node.cache.capacity import Capacity
from compute_node.cache.expert_cache import ExpertCache
from compute_node.cache.policy_chooser import PolicyChooser
from compute_node.engine.engine import Engine
from compute_node.engine.request import Request
from compute_node.engine.sequence import SequenceState
from compute_node.engine.usage import Usage
from compute_node.moe.route import EXACT, Route, RoutePolicy
from compute_node.moe.routes.rules import policy_of
from compute_node.moe.step import Phase
from compute_node.store.borrow import StoreClient
from expert_store.manifest.manifest import Manifest
from expert_store.offline.pack import pack
from proto import errors
from proto.expert import ExpertKey
from tests.checkpoints import make
from tests.contract.test_exactness import engine
from tests.local_store import local_store

TOKENS = [5, 9, 2, 7, 11, 3, 8, 1]
WIDE = {"hidden_size": 256, "moe_intermediate_size": 64, "head_dim": 64}


class AllSmall:
    """Small records will do for everything."""

    needs_scores = needs_small = True

    def apply(self, route: Route, resident: Container[int]) -> Route:
        return replace(route, small=tuple(frozenset(row) for row in route.ids.tolist()))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    return make("qwen3_moe", folder / "checkpoint", request.param, **WIDE)


@pytest.fixture
def node(checkpoint: Path, tmp_path: Path) -> Iterator[Engine]:
    pack(checkpoint, tmp_path / "store", variants=("int4",))
    with engine(tmp_path / "store", tmp_path, spare=2, pooled=True) as started:
        yield started


def logits(node: Engine, policy: RoutePolicy = EXACT) -> list[Tensor]:
    """Of `TOKENS`, one after another as decode computes them."""
    sequence, found = SequenceState("s", [], policy=policy), list[Tensor]()
    for token_id in TOKENS:
        sequence.token_ids.append(token_id)
        found += node.decode([sequence])
    return found


@contextmanager
def of_a_store(checkpoint: Path, folder: Path, weight_format: str) -> Iterator[Engine]:
    """A node of a store that holds nothing else."""
    folder.mkdir()
    pack(checkpoint, folder / "store", weight_format=weight_format)
    with engine(folder / "store", folder, spare=2, pooled=True) as alone:
        yield alone


def test_small_records_alone_are_a_store_of_their_format(
    node: Engine, checkpoint: Path, tmp_path: Path
) -> None:
    with of_a_store(checkpoint, tmp_path / "int4", "int4") as alone:
        expected = logits(alone)
    torch.testing.assert_close(logits(node, AllSmall()), expected, rtol=0, atol=0)
    assert not any(key in node.cache for key in all_experts(node)), "none is exact"
    assert sum(map(node.cache.holds, all_experts(node))) > node.cache.capacity.slots, "they share"


def test_exact_sequences_beside_lossy_ones_keep_their_bits(
    node: Engine, checkpoint: Path, tmp_path: Path
) -> None:
    with of_a_store(checkpoint, tmp_path / "exact", "exact") as alone:
        expected = logits(alone)
    for _ in range(2):
        torch.testing.assert_close(logits(node), expected, rtol=0, atol=0)
        assert not torch.equal(torch.cat(logits(node, AllSmall())), torch.cat(expected))


@pytest.mark.parametrize("weight_format", ["int4", "exact"])
def test_a_prompt_goes_by_the_route_where_it_may(
    weight_format: str, node: Engine, checkpoint: Path, tmp_path: Path
) -> None:
    with of_a_store(checkpoint, tmp_path / "alone", weight_format) as alone:
        expected = alone.prefill(SequenceState("s", TOKENS))
    may = weight_format == "int4"
    usage = Usage()
    prompt = SequenceState("s", TOKENS, policy=AllSmall(), routes_prompt=may)
    torch.testing.assert_close(node.prefill(prompt, usage=usage), expected, rtol=0, atol=0)
    assert (usage.small > 0) == may


def test_what_is_resident_in_full_is_computed_in_full(checkpoint: Path, tmp_path: Path) -> None:
    pack(checkpoint, tmp_path / "store", variants=("int4",))
    with engine(tmp_path / "store", tmp_path, spare=32, pooled=True) as node:
        exact = SequenceState("exact", TOKENS[:1])
        again = SequenceState("again", TOKENS[:1], policy=AllSmall())
        (expected,), read = node.decode([exact]), bytes_read(node)
        (found,) = node.decode([again])
        assert torch.equal(found, expected) and bytes_read(node) == read


def bytes_read(node: Engine) -> int:
    return sum(counters.bytes_read for counters in node.cache.counters.values())


def all_experts(node: Engine) -> list[ExpertKey]:
    spec = node.loaded.spec
    return [ExpertKey(layer, e) for layer in spec.moe_layers for e in range(spec.num_experts)]


def test_a_step_counts_what_it_computed_with_small_records(node: Engine) -> None:
    sequence = SequenceState("s", TOKENS[:1], policy=AllSmall())
    _, step = node.forward(sequence, TOKENS[:1], Phase.DECODE)
    assert step.num_small == node.loaded.spec.top_k * len(node.loaded.spec.moe_layers)


def test_a_store_without_small_records_refuses_the_rule(checkpoint: Path, tmp_path: Path) -> None:
    pack(checkpoint, tmp_path / "store")
    with engine(tmp_path / "store", tmp_path, pooled=True) as node:
        request = Request((1, 2), policy=policy_of("precision .5"))
        with pytest.raises(errors.InvalidRequest, match="--variants exact,int4"):
            next(node.generate(request))


def test_an_exact_pass_beside_leaves_small_records_small(
    node: Engine, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red where what a check reads becomes resident: the lossy pass would be as good as exact."""
    monkeypatch.setattr(node.cache.upgrades, "begin", lambda *args: None)
    plain = logits(node, AllSmall())
    with of_a_store(checkpoint, tmp_path / "exact", "exact") as alone:
        exact = logits(alone)
    sequence, checked = SequenceState("s", [], policy=AllSmall()), list[Tensor]()
    for token_id in TOKENS:
        sequence.token_ids.append(token_id)
        found = node.exact_pass.logits(sequence)
        assert found is not None
        assert torch.equal(found, exact[0]) == (not checked), "the first token's state is equal"
        checked += node.decode([sequence])
    assert all(map(torch.equal, plain, checked))
    assert not any(key in node.cache for key in all_experts(node)), "none is exact"
    assert node.exact_pass.num_done == len(TOKENS)


def test_nodes_that_share_a_store_find_room_whatever_they_ask(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Exact and small records of two nodes in the same slots, one thread."""
    pack(checkpoint, tmp_path / "store", variants=("int4",))
    spec, chance = Manifest.load(tmp_path / "store").spec, random.Random(7)
    with local_store(tmp_path / "store", tmp_path, 14, read_depth=2) as address, ExitStack() as end:
        caches = [end.enter_context(cache_of(address, tmp_path, f"n{n}")) for n in range(2)]
        for _ in range(300):
            experts = chance.sample(range(spec.num_experts), chance.choice([1, 4, 4, 9]))
            small = {expert: "int4" for expert in experts if chance.random() < 0.7}
            cache, layer = chance.choice(caches), chance.choice(spec.moe_layers)
            _, waves = cache.step(layer, experts, small=small)
            came = {borrowed.key.expert: borrowed for wave in waves for borrowed in wave}
            assert came.keys() == set(experts)
            assert all(one.is_exact or expert in small for expert, one in came.items())


@contextmanager
def cache_of(address: str, run_dir: Path, name: str) -> Iterator[ExpertCache]:
    """Six slots."""
    client = StoreClient(address, name, 6, run_dir / "sessions", deadline_s=10)
    try:
        description = client.describe()
        spec, exact_bytes = description.spec, description.lease_bytes["exact"]
        num_parts = exact_bytes // description.lease_bytes["int4"]
        layers = spec.moe_layers
        capacity = Capacity(6 * exact_bytes, exact_bytes, layers, spec.top_k, True, num_parts)
        chooser = PolicyChooser("decayed", 16, layers, spec.num_experts, lambda: None)
        cache = ExpertCache(client, capacity, chooser)
        cache.open()
        yield cache
    finally:
        client.close()
