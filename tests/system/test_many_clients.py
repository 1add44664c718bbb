"""Requests that come, end, stop and leave at random, over the whole stack: each answer is what its
prompt gives alone.

Planted faults seen red: state of a lossy prompt kept as exact, room of who left not given back.
"""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from compute_node.client.node_client import NodeClient
from tests.stack import ServedStack, served, wait_for

pytestmark = pytest.mark.system
PROMPTS = [
    [(7 * n + n * n + 31 * number) % 8000 + 100 for n in range(20 + 90 * (number % 4))]
    for number in range(8)
]
TOKENS = 48
SYSTEM = [(11 * n) % 8000 + 100 for n in range(70)]


@dataclass(frozen=True)
class Ask:
    """leaves_after: tokens; None: it stays to the end"""

    prompt: int
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    leaves_after: int | None = None
    route: str = ""
    is_held: bool = False


def random_ask(dice: random.Random, alone: list[list[int]]) -> Ask:
    prompt = dice.randrange(len(PROMPTS))
    stops = (alone[prompt][dice.randrange(TOKENS)],) if dice.random() < 0.3 else ()
    leaves_after = dice.randrange(TOKENS) if dice.random() < 0.3 else None
    route = "skip .5" if dice.random() < 0.2 else ""
    return Ask(prompt, dice.randrange(1, TOKENS + 1), stops, leaves_after, route)


def expected(ask: Ask, alone: list[int]) -> list[int]:
    tokens = alone[: ask.max_tokens]
    ends = [at for at, token in enumerate(tokens, start=1) if token in ask.stop_token_ids]
    return tokens[: min(ends, default=len(tokens))][: ask.leaves_after]


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "integer"}}, "b": {"type": "string"}},
    "required": ["a", "b"],
}


def answered(stack: ServedStack, ask: Ask) -> list[int]:
    with stack.client() as node:
        answer = node.generate(
            PROMPTS[ask.prompt],
            max_tokens=ask.max_tokens,
            stop_token_ids=ask.stop_token_ids,
            ignore_eos=True,
            route=ask.route,
            grammar=SCHEMA if ask.is_held else None,
            timeout_s=120,
        )
        tokens = list[int]()
        for piece in answer:
            if len(tokens) == ask.leaves_after:
                answer.cancel()
                break
            tokens.append(piece.token_id)
    return tokens


def test_answers_that_are_held_are_the_same_in_turns(tiny_store: Path, run_dir: Path) -> None:
    """Beside others that are not."""
    asks = [Ask(number, TOKENS, is_held=number % 4 != 3) for number in range(len(PROMPTS))]
    with served(tiny_store, run_dir, "--experts-memory", "37.5%") as stack:
        alone = [answered(stack, ask) for ask in asks]
        with ThreadPoolExecutor(len(asks)) as pool:
            together = list(pool.map(lambda ask: answered(stack, ask), asks))
    assert together == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


@pytest.mark.parametrize("share", ["37.5%", "100%"])
def test_each_answer_is_what_its_prompt_gives_alone(
    share: str, tiny_store: Path, run_dir: Path
) -> None:
    with served(tiny_store, run_dir, "--experts-memory", share) as stack:
        alone = [answered(stack, Ask(number, TOKENS)) for number in range(len(PROMPTS))]
        wrong = list[tuple[Ask, list[int]]]()

        def client(seed: int) -> None:
            dice = random.Random(seed)
            for _ in range(6):
                time.sleep(dice.random() * 0.2)
                ask = random_ask(dice, alone)
                found = answered(stack, ask)
                if ask.route == "" and found != expected(ask, alone[ask.prompt]):
                    wrong.append((ask, found))

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, wrong
        with stack.client() as node:
            wait_for(lambda: is_idle(node), 20, "what left to be let go of")


def is_idle(node: NodeClient) -> bool:
    """Nothing is alive, and what was reserved came back."""
    stats = node.stats()
    return stats.live == stats.queued == stats.reserved_bytes == 0


def test_the_next_turn_computes_only_what_is_new(tiny_store: Path, run_dir: Path) -> None:
    """An exact request never takes state that a lossy prompt left."""
    end = 0  # the shipped model's special token
    first = [*SYSTEM, end, *PROMPTS[1], end, 9]
    with served(tiny_store, run_dir, "--experts-memory", "100%") as stack, stack.client() as node:
        lossy = node.generate(first, max_tokens=4, route="skip .5", route_prompts=True).run()
        answer = node.generate(first, max_tokens=12, ignore_eos=True).run()
        assert (lossy.reused_tokens, answer.reused_tokens) == (0, 0)
        second = [*first, *answer.token_ids, end, *PROMPTS[0], end]
        reused = node.generate(second, max_tokens=12, ignore_eos=True).run()
        assert reused.reused_tokens == len(first) - 1
        assert reused.prefill.tokens == len(second) - reused.reused_tokens
        stats = node.stats()
        assert stats.kept_hits == 1 and stats.tokens_saved == reused.reused_tokens
    with served(tiny_store, run_dir, "--experts-memory", "100%") as stack, stack.client() as node:
        fresh = node.generate(second, max_tokens=12, ignore_eos=True).run()
    assert fresh.token_ids == reused.token_ids and fresh.reused_tokens == 0
