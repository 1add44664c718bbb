"""Decode and prefill with every expert resident, against each of transformers' ways to compute
them. `python -m tests.bench.resident --model DIR` does so for another checkpoint.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from compute_node.client.node_client import NodeClient
from expert_store.manifest.manifest import Manifest
from expert_store.offline.index import index
from tests.bench.table import show, spread
from tests.daemons import daemon, node_table, store_table
from tests.stack import MODEL

WAYS = ("eager", "grouped_mm", "batched_mm")
OURS = "FlashMoE"
PROMPT_TOKENS, LONG_PROMPT_TOKENS, TOKENS, ROUNDS = 16, 512, 96, 5

Figures = dict[str, list[float]]


def main(folder: Path, source: Path = MODEL) -> None:
    index(source, folder / "store")
    spec = Manifest.load(folder / "store").spec
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    slots = spec.num_experts_total
    table = store_table(folder / "store", folder, slots + 4)
    with (
        daemon("expert_store", folder, table),
        daemon("compute_node", folder, node_table(folder, "n", slots), "n") as node,
        NodeClient(node.address) as client,
    ):
        decode, prefill = measure(model, client)
    rounds = f"{torch.get_num_threads()} threads, {ROUNDS} rounds in turn"
    name = "the shipped model" if source == MODEL else source.name
    show(
        f"Decode of {name}, all experts resident, {rounds}",
        ["engine", "ms a token", "speed of the best transformers"],
        rows(decode, 1e3 / TOKENS),
    )
    show(
        f"First token of a prompt of {LONG_PROMPT_TOKENS} tokens, {name}, all experts resident, "
        f"{rounds}",
        ["engine", "ms", "speed of the best transformers"],
        rows(prefill, 1e3),
    )


def measure(model: torch.nn.Module, client: NodeClient) -> tuple[Figures, Figures]:
    """Seconds of a generation without its prompt, and of a long prompt, by engine; a first round is
    not counted.
    """
    decode: Figures = {name: [] for name in (*WAYS, OURS)}
    prefill: Figures = {name: [] for name in (*WAYS, OURS)}
    short, long = prompt(PROMPT_TOKENS), prompt(LONG_PROMPT_TOKENS)
    for _ in range(ROUNDS + 1):
        for way in WAYS:
            model.set_experts_implementation(way)  # type: ignore[operator]
            decode[way].append(_decode_s(model, short))
            prefill[way].append(_prefill_s(model, long))
        result = client.generate(short, max_tokens=TOKENS + 1, ignore_eos=True).run()
        decode[OURS].append(TOKENS / result.tokens_per_s)
        first = client.generate(long, max_tokens=1, ignore_eos=True).run()
        prefill[OURS].append(first.ttft_s)
    return _without_first(decode), _without_first(prefill)


def prompt(num_tokens: int) -> list[int]:
    """Ids that every model has, and that go to many experts."""
    return [(7 * n + n * n) % 997 + 3 for n in range(num_tokens)]


def rows(figures: Figures, scale: float) -> list[list[str]]:
    """Each engine's time, and how often it is as fast as the best of transformers, round by
    round.
    """
    best = figures[min(WAYS, key=lambda way: statistics.median(figures[way]))]
    return [
        [
            name if name == OURS else f"transformers {name}",
            spread([scale * value for value in values], 2),
            spread([other / own for other, own in zip(best, values, strict=True)], 2),
        ]
        for name, values in figures.items()
    ]


def _without_first(figures: Figures) -> Figures:
    return {name: values[1:] for name, values in figures.items()}


@torch.inference_mode()
def _decode_s(model: torch.nn.Module, ids: list[int]) -> float:
    """Of the same loop as ours."""
    output = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
    start_s = time.perf_counter()
    for _ in range(TOKENS):
        token = int(output.logits[:, -1].argmax())
        output = model(
            torch.tensor([[token]]),
            past_key_values=output.past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )
    return time.perf_counter() - start_s


@torch.inference_mode()
def _prefill_s(model: torch.nn.Module, ids: list[int]) -> float:
    start_s = time.perf_counter()
    model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start_s


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help="a checkpoint")
    with tempfile.TemporaryDirectory(prefix="fm-bench-", dir=Path.cwd()) as where:
        main(Path(where), parser.parse_args().model)
