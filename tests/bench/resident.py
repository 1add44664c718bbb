"""Decode with every expert resident, against plain transformers: eager and its default experts."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compute_node.client import NodeClient
from expert_store.index import index
from tests.bench.table import show, spread
from tests.daemons import daemon, node_table, store_table
from tests.stack import MODEL

PROMPT, TOKENS, ROUNDS = "In the beginning God created", 128, 5


def main(folder: Path) -> None:
    index(MODEL, folder / "store")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    ids = AutoTokenizer.from_pretrained(MODEL)(PROMPT)["input_ids"]
    ways = {"transformers eager": "eager", "transformers grouped_mm": "grouped_mm"}
    speeds: dict[str, list[float]] = {name: [] for name in [*ways, "FlashMoE"]}
    table = store_table(folder / "store", folder, 260)
    with (
        daemon("expert_store", folder, table),
        daemon("compute_node", folder, node_table(folder, "n", 256), "n") as node,
        NodeClient(node.address) as client,
    ):
        for round_number in range(ROUNDS + 1):
            for name, implementation in ways.items():
                speed = _transformers(model, implementation, ids)
                speeds[name] += [speed] if round_number else []
            result = client.generate(ids, max_tokens=TOKENS, ignore_eos=True).run()
            speeds["FlashMoE"] += [result.tokens_per_s] if round_number else []
    eager = speeds["transformers eager"]
    show(
        f"Decode of the shipped model, all experts resident, {torch.get_num_threads()} threads, "
        f"{ROUNDS} rounds in turn",
        ["engine", "tokens/s", "of eager"],
        [
            [name, spread(values), spread([a / b for a, b in zip(values, eager, strict=True)], 2)]
            for name, values in speeds.items()
        ],
    )


@torch.inference_mode()
def _transformers(model: torch.nn.Module, implementation: str, ids: list[int]) -> float:
    """Tokens a second of the same loop as ours, prefill excluded."""
    model.set_experts_implementation(implementation)  # type: ignore[operator]
    output = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
    start_s = time.perf_counter()
    for _ in range(TOKENS - 1):
        token = int(output.logits[:, -1].argmax())
        output = model(
            torch.tensor([[token]]),
            past_key_values=output.past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )
    return (TOKENS - 1) / (time.perf_counter() - start_s)
