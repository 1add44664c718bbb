"""Experts that a worker is asked to read ahead: read before they are needed, withdrawn where they
are not.

Planted faults seen red: nothing read, wrong guesses not counted, a prompt that never gives way,
what was used kept from guesses, what found no room forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from compute_node.boxes.work import Work
from compute_node.engine.engine import Engine
from compute_node.worker.lent_experts import LentExperts
from proto import errors
from proto.expert import ExpertKey
from proto.held_experts import HeldExperts
from tests.contract.test_exactness import engine
from tests.stack import wait_for

LAYER = 2


@pytest.fixture
def node(tiny_store: Path, run_dir: Path) -> Iterator[Engine]:
    with engine(tiny_store, run_dir) as found:
        yield found


@pytest.fixture
def lent(node: Engine) -> LentExperts:
    return LentExperts(node.loaded.kernels, node.loaded.spec.num_experts, node.cache)


def work(node: Engine, experts: list[int], num_tokens: int = 1) -> Work:
    loaded, num = node.loaded, len(experts)
    hidden = torch.randn(num_tokens, loaded.hidden_size).to(loaded.dtype)
    ids = torch.tensor([experts] * num_tokens)
    return Work.of(LAYER, sorted(experts), hidden, ids, torch.full((num_tokens, num), 1 / num))


def test_what_was_prepared_is_read_before_it_is_computed(node: Engine, lent: LentExperts) -> None:
    wanted = [expert for expert in range(8) if ExpertKey(LAYER, expert) not in node.cache][:2]
    lent.prepare(LAYER, wanted)
    wait_for(lambda: len(in_memory(node, wanted)) == 2, 10, "the store to have read them")
    before = node.cache.counters[LAYER].bytes_read
    lent.compute(work(node, wanted))
    assert node.cache.counters[LAYER].bytes_read == before, "the store had them"
    assert (lent.num_right, lent.num_wrong) == (2, 0)


def test_what_is_named_no_more_or_not_used_is_wrong(node: Engine, lent: LentExperts) -> None:
    lent.prepare(LAYER, [0, 1])
    lent.prepare(LAYER, [1, 3])
    assert lent.num_wrong == 1
    lent.compute(work(node, [4, 5]))
    assert (lent.num_right, lent.num_wrong) == (0, 3)
    lent.prepare(LAYER, [6])
    lent.forget_prepared()
    assert (lent.num_right, lent.num_wrong) == (0, 4)


def test_what_found_no_room_is_read_once_work_is_done(tiny_store: Path, run_dir: Path) -> None:
    """All slots hold what is expected, until work is done with its part."""
    with engine(tiny_store, run_dir, pooled=True) as node:
        lent = LentExperts(node.loaded.kernels, node.loaded.spec.num_experts, node.cache)
        other, far = LAYER + 1, LAYER + 2
        num_here = (node.cache.capacity.slots + node.cache.room.num_spare) // 2
        here = list(range(num_here))
        lent.prepare(LAYER, here)
        lent.prepare(other, here)
        lent.prepare(far, [0, 1, 2])
        assert lent._left_out == {far: [ExpertKey(far, expert) for expert in range(3)]}
        lent.compute(work(node, here[:4]))
        lent.prepare_left_out()
        wait_for(lambda: in_memory(node, [0, 1, 2], far) == [0, 1, 2], 10, "the store to read them")
        assert not lent._left_out


def test_more_than_fits_is_not_read_ahead(node: Engine, lent: LentExperts) -> None:
    for _ in range(3):
        for layer in node.loaded.spec.moe_layers:
            lent.prepare(layer, range(node.loaded.spec.num_experts))
    assert torch.equal(*(lent.compute(one) for one in [work(node, [1, 9])] * 2))


def test_what_a_share_lacks_is_refused_before_the_store_is_asked(
    node: Engine, tiny_store: Path
) -> None:
    """Written against: the store asked, which ends the session."""
    held = HeldExperts(frozenset(ExpertKey(LAYER, expert) for expert in range(8)))
    lent = LentExperts(node.loaded.kernels, node.loaded.spec.num_experts, node.cache, held)
    assert lent.compute(work(node, [3, 7])).shape[0] == 2
    with pytest.raises(errors.ExpertElsewhere, match=r"without experts \[8\] of layer 2"):
        lent.compute(work(node, [3, 8]))
    with pytest.raises(errors.ExpertElsewhere, match=r"\[9\]"):
        lent.prepare(LAYER, [3, 9])


def test_a_prompt_gives_way_between_its_experts(node: Engine, lent: LentExperts) -> None:
    experts, done = list(range(node.loaded.spec.num_experts)), list[object]()
    prompt, token = work(node, experts, num_tokens=4), work(node, [3, 4])
    expected, expected_token = lent.compute(prompt), lent.compute(token)
    give_way: Callable[[], None] = lambda: done.append(lent.compute(token))  # noqa: E731
    assert torch.equal(lent.compute(prompt, give_way=give_way), expected)
    assert done and all(torch.equal(one, expected_token) for one in done)


@pytest.mark.parametrize(("layer", "experts"), [(99, [0]), (LAYER, [0, 4000])])
def test_what_the_model_does_not_have_is_refused(
    lent: LentExperts, layer: int, experts: list[int]
) -> None:
    with pytest.raises(errors.InvalidRequest, match="the model has no experts"):
        lent.prepare(layer, experts)


def in_memory(node: Engine, experts: list[int], layer: int = LAYER) -> list[int]:
    held = {record.expert for record in node.cache.lender.resident()}
    return [expert for expert in experts if ExpertKey(layer, expert) in held]


def test_what_is_moved_in_is_read_and_outlives_the_next_work(
    node: Engine, lent: LentExperts
) -> None:
    """Planted faults seen red: taken for a wrong guess, not said to be held, withdrawn by the next
    work, still said to be held once the main node has left.
    """
    [wanted, *others] = [e for e in range(8) if ExpertKey(LAYER, e) not in node.cache]
    lent.move_in(LAYER, [wanted])
    assert wanted in lent.held_of(LAYER)
    wait_for(lambda: in_memory(node, [wanted]), 10, "the store to have read it")
    lent.compute(work(node, others[:1]))
    assert lent.num_read == 1 and {wanted, others[0]} <= lent.held_of(LAYER)
    assert lent.num_wrong == 0 and in_memory(node, [wanted])
    before = node.cache.counters[LAYER].bytes_read
    lent.compute(work(node, [wanted]))
    assert node.cache.counters[LAYER].bytes_read == before, "the store had it"
    lent.compute(work(node, [wanted]))
    assert lent.num_read == 0
    lent.move_in(LAYER, others[1:2])
    lent.forget_prepared()
    assert others[1] not in lent.held_of(LAYER)
