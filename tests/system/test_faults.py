"""Every daemon may die alone: tokens equal an undisturbed run, nothing leaks.

Faults seen red: a cache that keeps its leases after its session broke, so that the store waits for
the node's lock for ever.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from proto import errors
from tests.stack import ServedStack, served, wait_for

pytestmark = pytest.mark.system
TOKENS = 160
FEW_TOKENS = 40  # of a node that runs ahead at every layer, which takes its time
DAEMONS = ("expert_store", "compute_node", "scheduler")


def assert_healthy_and_idle(stack: ServedStack) -> None:
    """Everybody serves again, and no slot is filling or held beyond the node's cache."""

    def settled() -> bool:
        facts = stack.status()
        store, node = facts["expert_store"], facts["compute_node"]
        return (
            all(
                facts[n]["health"] == "SERVING"
                for n in ("expert_store", "compute_node", "scheduler")
            )
            and store["slots_filling"] == 0
            and store["orphaned_sessions"] == 0
            and store["sessions"] == 1
            and store["slots_leased"] == node["resident"]
        )

    wait_for(settled, 60, "the stack to settle")


def advice_published(stack: ServedStack) -> int:
    return int(stack.status()["scheduler"]["advice_published"])


def generate_disturbed(stack: ServedStack, victim: str, max_tokens: int = TOKENS) -> list[int]:
    """Kill `victim` after the tenth token of a generation that then goes on."""
    with stack.client() as node:
        generation = node.generate(
            "In the beginning", max_tokens=max_tokens, ignore_eos=True, timeout_s=120
        )
        for number, _ in enumerate(generation):
            if number == 10:
                stack.kill(victim)
        assert generation.result is not None
        return generation.result.token_ids


@pytest.fixture(params=["always", "off"])
def run_ahead(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """Options of a stack whose node runs ahead at every layer, or not at all; by default it does
    where waits are long, which those of the shipped model are not.
    """
    settings = tmp_path / "flashmoe.toml"
    settings.write_text(f'[compute_node]\nrun_ahead = "{request.param}"\n')
    return "--config", str(settings)


@pytest.mark.parametrize("victim", ["expert_store", "scheduler", "valkey"])
def test_killed_during_generation_the_tokens_are_the_same(
    victim: str, tiny_store: Path, run_dir: Path, run_ahead: tuple[str, str]
) -> None:
    num_tokens = FEW_TOKENS if "always" in Path(run_ahead[1]).read_text() else TOKENS
    with served(tiny_store, run_dir, *run_ahead) as stack:
        undisturbed = stack.generate(max_tokens=num_tokens)
        assert generate_disturbed(stack, victim, num_tokens) == undisturbed
        assert_healthy_and_idle(stack)
        if victim == "expert_store":
            assert stack.status()["compute_node"]["store_reconnects"] == 1
        else:
            before = advice_published(stack)
            stack.generate(max_tokens=8)
            wait_for(
                lambda: stack.status()["scheduler"]["advice_published"] != before,
                30,
                "advice to flow",
            )


def test_node_killed_is_unavailable_and_its_leases_come_back(
    tiny_store: Path, run_dir: Path
) -> None:
    with served(tiny_store, run_dir) as stack:
        undisturbed = stack.generate(max_tokens=TOKENS)
        with pytest.raises(errors.Unavailable):
            generate_disturbed(stack, "compute_node")
        assert_healthy_and_idle(stack)
        # A node that restarts starts warm: what the store still holds is borrowed again unread.
        assert stack.status()["compute_node"]["resident"] > 0
        assert stack.generate(max_tokens=TOKENS) == undisturbed


def test_stale_advice_falls_back_and_is_counted(tiny_store: Path, run_dir: Path) -> None:
    """A stalled scheduler costs the node nothing but its advice."""
    with served(tiny_store, run_dir, "--experts-memory", "40") as stack:
        undisturbed = stack.generate(max_tokens=TOKENS)
        wait_for(lambda: stack.status()["compute_node"]["advice_version"], 20, "advice")
        scheduler = stack.pid("scheduler")
        os.kill(scheduler, signal.SIGSTOP)
        try:
            wait_for(
                lambda: (stack.status()["compute_node"]["advice_age_s"] or 0) > 6, 30, "staleness"
            )
            before = stack.status()["compute_node"]["advice_fallbacks"]
            assert stack.generate(max_tokens=TOKENS) == undisturbed
            assert stack.status()["compute_node"]["advice_fallbacks"] > before
        finally:
            os.kill(scheduler, signal.SIGCONT)
        assert_healthy_and_idle(stack)


def test_sigterm_under_load_fails_no_request_in_flight(tiny_store: Path, run_dir: Path) -> None:
    """Fault: stopping the store before the node, or a drain that cancels."""
    with served(tiny_store, run_dir) as stack:
        results: list[list[int]] = []
        started = threading.Event()

        def request() -> None:
            with stack.client() as node:
                generation = node.generate(
                    "In the beginning", max_tokens=TOKENS, ignore_eos=True, timeout_s=60
                )
                for _ in generation:
                    started.set()
                results.append(generation.run().token_ids)

        threads = [threading.Thread(target=request) for _ in range(3)]
        for thread in threads:
            thread.start()
        started.wait(30)
        wait_for(lambda: stack.status()["compute_node"]["requests"] == 3, 30, "three requests")
        assert stack.stop() == 0
        for thread in threads:
            thread.join()
        assert len(results) == 3 and all(len(tokens) == TOKENS for tokens in results)


def test_client_that_vanishes_frees_the_node(
    tiny_store: Path, run_dir: Path, run_ahead: tuple[str, str]
) -> None:
    """Fault: a job that ignores its cancellation keeps the next request waiting for minutes."""
    with served(tiny_store, run_dir, "--experts-memory", "32", *run_ahead) as stack:
        with stack.client() as node:
            generation = node.generate("In the beginning", max_tokens=1900, ignore_eos=True)
            next(iter(generation))
            generation.cancel()
        with stack.client() as node:
            result = node.generate("In the beginning", max_tokens=4, timeout_s=20).run()
        assert len(result.token_ids) == 4 and result.queued_s < 5
        assert_healthy_and_idle(stack)


def test_deadline_ends_a_request_between_layers(tiny_store: Path, run_dir: Path) -> None:
    with served(tiny_store, run_dir) as stack:
        with stack.client() as node, pytest.raises(errors.DeadlineExceeded):
            node.generate("In", max_tokens=2000, ignore_eos=True, timeout_s=1.5).run()
        assert len(stack.generate(max_tokens=4)) == 4
        assert_healthy_and_idle(stack)


def test_full_queue_is_refused_at_once(tiny_store: Path, run_dir: Path) -> None:
    settings = run_dir.parent / f"{run_dir.name}.toml"
    settings.write_text("[compute_node]\nmax_queued_requests = 1\nmax_sequences = 1\n")
    with (
        served(tiny_store, run_dir, "--config", str(settings)) as stack,
        stack.client() as node,
    ):
        running = node.generate("In", max_tokens=1900, ignore_eos=True)
        next(iter(running))
        waiting = node.generate("In", max_tokens=4)
        wait_for(lambda: node.stats().queued == 1, 20, "the queue to fill")
        with pytest.raises(errors.QueueFull, match=r"retry in \d+ s"):
            node.generate("In", max_tokens=4).run()
        running.cancel()
        assert len(waiting.run().token_ids) == 4
    settings.unlink()
