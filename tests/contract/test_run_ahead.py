"""Running ahead changes nothing but what is read: the same logits when it fails, when the request
is cancelled in the middle of it, and when what it guessed is damaged or the session breaks.

Planted faults seen red: a second pass on the true state (below, for good), torch's threads and
gradient mode left as the second pass had them, a session's end taken for a fault of run-ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from compute_node.cache.asked import never
from compute_node.client.sampling_options import SamplingOptions
from compute_node.engine.engine import Engine
from compute_node.engine.request import Request
from compute_node.engine.sequence import SequenceState
from compute_node.predict.named_reads import NamedReads
from compute_node.run_ahead.fork import Fork
from compute_node.run_ahead.run_ahead import ON, RunAhead
from expert_store.offline.index import index
from proto import errors
from proto.expert import ExpertKey
from tests.contract.test_exactness import Reference, engine, prompt, reference
from tests.system.test_damage import flip_expert

NUM_STEPS = 12


@contextmanager
def ahead(
    name: str, tmp_path: Path, pooled: bool = False
) -> Iterator[tuple[Engine, RunAhead, Reference]]:
    """A node that runs ahead at every layer, and what eager gives."""
    expected = reference({}, name, torch.bfloat16, tmp_path)
    index(expected.root, tmp_path / "store")
    with engine(tmp_path / "store", tmp_path, 2, pooled, run_ahead="always") as node:
        assert node.run_ahead is not None
        yield node, node.run_ahead, expected


def decode(node: Engine, sequence: SequenceState) -> list[torch.Tensor]:
    """Logits of the prompt and of greedy steps after it."""
    logits = [node.prefill(sequence)]
    for _ in range(NUM_STEPS - 1):
        sequence.token_ids.append(int(logits[-1].argmax()))
        logits += node.decode([sequence])
    return logits


def is_exact(node: Engine, expected: Reference) -> bool:
    logits = decode(node, SequenceState("s", prompt()))
    return all(map(torch.equal, logits, expected.logits))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("pooled", [False, True])
def test_exact_and_foresees(name: str, pooled: bool, tmp_path: Path) -> None:
    with ahead(name, tmp_path, pooled) as (node, run_ahead, expected):
        assert is_exact(node, expected)
        assert run_ahead.num_layers >= NUM_STEPS - 1
        foreseen = [worth for name, _, worth in run_ahead.foresight.worths() if name == "run_ahead"]
        assert sum(worth.right for worth in foreseen) > 0


@pytest.mark.parametrize("name", ["mixtral", "qwen3_next"])
def test_a_leak_would_be_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second pass that writes to the true state, of attention and of recurrence."""

    def leak(fork: Any, number: int) -> None:
        fork.state.layers[number] = fork._true[number]

    monkeypatch.setattr(Fork, "enter", leak)
    monkeypatch.setattr(Fork, "leave", lambda fork, number: None)
    with ahead(name, tmp_path) as (node, _, expected):
        assert not is_exact(node, expected)


def test_goes_on_with_the_tokens_that_will_be_drawn(tmp_path: Path) -> None:
    """Through generate(), whose sampler tells what it will draw: seeded, so not the likeliest."""
    with ahead("mixtral", tmp_path) as (node, run_ahead, _):
        request = Request(
            tuple(prompt()), 8, sampling=SamplingOptions(temperature=1.0, seed=3), ignore_eos=True
        )
        run_ahead.always = False
        run_ahead.status = "off: to compare"
        plain = [event.token_id for event in node.generate(request) if hasattr(event, "token_id")]
        run_ahead.always, run_ahead.status = True, ON
        drawn = list[int]()
        ended = run_ahead.drop

        def keep() -> None:
            if run_ahead._second is not None:
                drawn.extend(run_ahead._second.drawn)
            ended()

        run_ahead.drop = keep  # type: ignore[method-assign]
        found = [event.token_id for event in node.generate(request) if hasattr(event, "token_id")]
    assert found == plain
    assert set(drawn) & set(plain), "the second pass went on with what was drawn"


def test_what_raises_in_it_ends_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with ahead("mixtral", tmp_path) as (node, run_ahead, expected):

        def fail(*_: Any) -> Any:
            raise RuntimeError("planted")

        monkeypatch.setattr(run_ahead, "usable", fail)
        assert is_exact(node, expected)
        assert run_ahead.status == "off: it failed (RuntimeError: planted)"
        assert is_exact(node, expected)
    assert sum("no run-ahead" in record.message for record in caplog.records) == 1


def test_a_cancelled_step_leaves_nothing(tmp_path: Path) -> None:
    with ahead("mixtral", tmp_path) as (node, run_ahead, expected):
        num_cancelled = 0
        for num_checks in range(8, 60):
            left = [None] * num_checks

            def check(left: list[None] = left) -> None:
                if not left:
                    raise errors.Cancelled("the caller went away")
                left.pop()

            try:
                list(node.generate(Request(tuple(prompt()), 3, ignore_eos=True), check))
            except errors.Cancelled:
                num_cancelled += 1
            assert run_ahead._second is None and run_ahead.layers.second is None
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert num_cancelled > 8
        assert is_exact(node, expected)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_the_true_pass_keeps_its_threads(tmp_path: Path) -> None:
    with ahead("mixtral", tmp_path) as (node, run_ahead, _):
        for _ in node.generate(Request(tuple(prompt()), 4, ignore_eos=True)):
            assert torch.get_num_threads() == 2
        assert run_ahead.num_starts > 0


def test_a_damaged_guess_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An expert that no step uses is damaged, and guessed at every layer."""
    with ahead("olmoe", tmp_path) as (node, run_ahead, expected):
        used = set[ExpertKey]()
        reached, read = run_ahead.reached, NamedReads.read

        def note(layer: int, keys: list[ExpertKey]) -> None:
            used.update(keys)
            reached(layer, keys)

        monkeypatch.setattr(run_ahead, "reached", note)
        decode(node, SequenceState("s", prompt()))
        sequence = SequenceState("s", prompt())
        logits = [node.prefill(sequence)]
        used.update(record.expert for record in node.cache.lender.resident())
        spec = node.loaded.spec
        everything = {ExpertKey(n, e) for n in spec.moe_layers[1:] for e in range(spec.num_experts)}
        damaged = min(everything - used)
        flip_expert(expected.root, tmp_path / "store", damaged)

        def and_damaged(
            reads: NamedReads, layer: int, distance: int, chosen: list[ExpertKey]
        ) -> None:
            read(reads, layer, distance, [*chosen, damaged] if layer == damaged.layer else chosen)

        monkeypatch.setattr(NamedReads, "read", and_damaged)
        for _ in range(NUM_STEPS - 1):
            sequence.token_ids.append(int(logits[-1].argmax()))
            logits += node.decode([sequence])
        assert all(map(torch.equal, logits, expected.logits))
        assert run_ahead.status == ON
        assert any("quarantined" in record.message for record in caplog.records)
        with pytest.raises(errors.ExpertDamaged):
            list(node.cache.step(damaged.layer, [damaged.expert], never)[1])


def test_a_session_that_breaks_meanwhile_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ahead("mixtral", tmp_path) as (node, run_ahead, expected):
        opened = node.cache.lender.num_opened  # type: ignore[attr-defined]
        foresee, calls = run_ahead.foresee, [0]

        def and_break(num_tokens: int, layer: int, experts: Any) -> bool:
            calls[0] += 1
            if calls[0] == 5:
                node.cache.lender.abort()
            return foresee(num_tokens, layer, experts)

        monkeypatch.setattr(run_ahead, "foresee", and_break)
        assert is_exact(node, expected)
        assert run_ahead.status == ON
        assert node.cache.lender.num_opened > opened  # type: ignore[attr-defined]
