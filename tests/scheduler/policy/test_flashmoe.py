"""The nets of the `flashmoe` policy: what they see, what they are taught, when they learn.

Planted faults seen red: frequency that is not reset by a generation, distances of one step more,
trained on what is held out, a lesson every 256 steps, torch left on one thread.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from scheduler.lab import imitation
from scheduler.lab.imitation import imitate_belady
from scheduler.lab.policies import POLICIES, Background, learn_flashmoe
from scheduler.policy import flashmoe
from scheduler.policy.flashmoe import FlashMoe, Net, Usage
from scheduler.policy.lru import Lru
from scheduler.simulate.replay import Setting, ranked, replay
from scheduler.simulate.trace import AccessTrace
from tests.scheduler.replays import misses, recorded, trace_of


def rings(num_generations: int, seed: int, num_steps: int = 60) -> AccessTrace:
    """Each generation keeps to twelve of sixteen experts and goes round them two by two: recency is
    the worst of guides among them, and nothing else matters.
    """
    random = np.random.default_rng(seed)
    steps = []
    for _ in range(num_generations):
        ring = [random.permutation(16)[:12] for _ in range(2)]
        at = random.integers(6)
        for step in range(num_steps):
            first = 2 * ((at + step) % 6)
            steps.append([layer[first : first + 2].tolist() for layer in ring])
    return trace_of(steps, 16, [*range(0, len(steps) + 1, num_steps)])


def random_net(shape: tuple[int, int], seed: int = 0) -> Net:
    random = np.random.default_rng(seed)
    widths = (2 * shape[1], 64, 64, shape[1])
    return Net(
        tuple(
            random.normal(size=(shape[0], inputs, outputs)).astype(np.float32) / 8
            for inputs, outputs in pairwise(widths)
        ),
        tuple(np.zeros((shape[0], 1, outputs), np.float32) for outputs in widths[1:]),
    )


def test_sees_recency_and_the_generation_s_frequency() -> None:
    trace = trace_of([[[0, 1]], [[0, 2]], [[0, 3]], [[2, 3]]], 5, seq_offsets=[0, 2, 4])
    usage = Usage(trace.shape)
    seen = []
    for event in trace.events():
        usage.observe(event)
        seen.append(usage.features()[0])
    recency, frequency = seen[1][:5], seen[1][5:]
    assert recency.tolist() == [1, 0.5, 1, 0, 0], "never used: 0"
    assert frequency.tolist() == [1, 0.5, 0.5, 0, 0]
    recency, frequency = seen[3][:5], seen[3][5:]
    assert recency.tolist() == [0.5, 0.25, 1, 1, 0], "goes on over generations"
    assert frequency.tolist() == [0.5, 0, 0.5, 1, 0], "begins anew with each"


def test_is_taught_the_distance_to_the_next_use() -> None:
    """Eight experts: a horizon of six steps. 1 at once, 0 next but one; 2 never."""
    trace = trace_of([[[0]], [[1]], [[0]], [[1]], [[3]], [[3]], [[3]], [[3]], [[3]], [[0]]], 8)
    distances = imitation._distances(trace, np.arange(trace.num_steps))
    np.testing.assert_allclose(distances[0, 0, :4], [0.2, 0, 1, 0.6], atol=1e-3)
    np.testing.assert_allclose(distances[2, 0, :3], [1, 0, 1], atol=1e-3)
    np.testing.assert_allclose(distances[4, 0, 0], 0.8, atol=1e-3)


def test_holds_out_whole_generations_or_the_end() -> None:
    trace = rings(20, seed=0)
    held_out = imitation._held_out(trace, np.random.default_rng(0)).reshape(20, 60)
    assert held_out.all(axis=1).sum() == held_out.any(axis=1).sum() == 2
    of_few = imitation._held_out(rings(2, seed=0), np.random.default_rng(0))
    assert of_few[-12:].all() and not of_few[:-12].any()


def test_is_not_trained_on_what_it_is_stopped_by(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[set[int]] = []
    take = imitation._Examples.batch

    def watched(examples: imitation._Examples, at: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batches.append({*at.tolist()} if torch.is_grad_enabled() else set())
        return take(examples, at)

    monkeypatch.setattr(imitation._Examples, "batch", watched)
    trace = rings(20, seed=0)
    imitate_belady(trace, seed=3)
    held_out = np.flatnonzero(imitation._held_out(trace, np.random.default_rng(3)))
    trained = set().union(*batches)
    assert not trained & {*held_out.tolist()}
    assert len(trained) == trace.num_steps - len(held_out)


def test_goes_round_with_the_ring() -> None:
    """LRU misses every time in a ring that is larger than the cache; the net does not."""
    trace = rings(8, seed=1)
    setting = Setting(trace, slots=8, warmup_steps=0)
    background = Background(rings(40, seed=0))
    learned = replay(setting, POLICIES["flashmoe"](setting, background)).misses
    lru, fewest = misses("lru", trace, 8), misses("min", trace, 8)
    assert fewest <= learned < fewest + 0.5 * (lru - fewest)


def test_the_same_seed_gives_the_same_net_and_torch_its_threads_back() -> None:
    trace = rings(12, seed=0, num_steps=30)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one, other = imitate_belady(trace), imitate_belady(trace)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    for first, second in zip(one.weights, other.weights, strict=True):
        np.testing.assert_array_equal(first, second)


def test_numpy_runs_what_torch_trained() -> None:
    training = imitation._Training((2, 16), seed=0)
    inputs = torch.rand(2, 1, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = training._forward(inputs)[:, 0].numpy()
    got = training._net().scores(inputs[:, 0].numpy())
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_evicts_what_the_net_sees_farthest() -> None:
    trace = recorded()
    net = random_net(trace.shape)
    policy, usage = FlashMoe(trace.shape, net, imitation.imitate_belady), Usage(trace.shape)
    for event in list(trace.events())[:20]:
        policy.observe(event)
        usage.observe(event)
    np.testing.assert_array_equal(policy.ranks(), -net.scores(usage.features()).astype(np.float64))


def test_from_nothing_goes_by_recency_and_learns_at_powers_of_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lessons: list[tuple[int, list[int]]] = []

    def learn(past: AccessTrace) -> Net:
        lessons.append((past.num_steps, past.seq_offsets.tolist()))
        return random_net(past.shape)

    monkeypatch.setattr(flashmoe, "FIRST_LESSON_STEPS", 16)
    trace = rings(4, seed=0, num_steps=25)
    policy, lru = FlashMoe(trace.shape, None, learn), Lru(trace.shape)
    for step, event in enumerate(trace.events(), start=1):
        policy.observe(event)
        lru.observe(event)
        assert (policy.ranks() == lru.ranks()).all() == (step < 16)
    assert [count for count, _ in lessons] == [16, 32, 64]
    assert lessons[1][1] == [0, 25, 32]


def test_one_background_trains_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[AccessTrace] = []

    def imitate(trace: AccessTrace) -> Net:
        trained.append(trace)
        return random_net(trace.shape)

    monkeypatch.setattr(imitation, "imitate_belady", imitate)
    background = Background(rings(2, seed=0))
    for slots in (6, 8):
        setting = Setting(rings(1, seed=1), slots, warmup_steps=0)
        POLICIES["flashmoe"](setting, background)
    assert trained == [background.train]
    assert Background().learned(learn_flashmoe) is None


@pytest.mark.parametrize(("scope", "golden"), [("layer", 2402), ("pool", 4387)])
def test_golden_misses_of_a_fixed_net(scope: str, golden: int) -> None:
    trace = recorded()
    setting = Setting(trace, 12, scope, warmup_steps=0)
    policy = FlashMoe(trace.shape, random_net(trace.shape), imitation.imitate_belady)
    assert replay(setting, ranked(setting, policy)).misses == golden
