"""transformers with experts on disk, answering prompts of standard input: a JSON line each.

Run in the peers' environment: `python -m tests.bench.peers.offload_worker FOLDER WHERE THREADS`.
WHERE: `memory`, plain transformers; a number, device_map="auto" with so many MiB of layers in
memory; a folder, accelerate's disk_offload to it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import disk_offload, init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from tests.bench.peers.prompt_lines import TEMPERATURE, serve


def load(folder: str, where: str) -> Any:
    logging.disable_progress_bar()
    if where == "memory":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if where.isdigit():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map="auto", max_memory={"cpu": f"{where}MiB"}
        )
    with init_empty_weights(include_buffers=False):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    return disk_offload(model, where, execution_device=torch.device("cpu"))


@torch.inference_mode()
def generate(model: Any, prompt: list[int], max_tokens: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    ids, cache = torch.tensor([prompt]), None
    for _ in range(max_tokens):
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        scores = torch.softmax(output.logits[0, -1].float() / TEMPERATURE, dim=-1)
        token = int(torch.multinomial(scores, 1, generator=generator))
        yield token
        ids = torch.tensor([[token]])


def main() -> None:
    folder, where, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = load(folder, where).eval()
    serve(lambda prompt, max_tokens, seed: generate(model, prompt, max_tokens, seed))


if __name__ == "__main__":
    main()
