"""Makes tests/traces/tiny-moe-decode.npz: `python -m tests.compute_node.record_trace`. Sampled,
seeded.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compute_node.client.sampling_options import SamplingOptions
from compute_node.engine.sampling import Sampler
from tests.compute_node.traces import PATH
from tests.stack import MODEL

PROMPTS = ("In the beginning God created", "def __init__(self, name):", "man: NAME\n ls -")
STEPS = 120


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: chosen.append(output[2]))
    steps: list[np.ndarray] = []
    offsets = [0]
    for prompt in PROMPTS:
        tokens = tokenizer(prompt)["input_ids"]
        sampler = Sampler(SamplingOptions(temperature=0.9, seed=1))
        chunk, cache = tokens, None
        for step in range(STEPS + 1):
            chosen.clear()
            with torch.inference_mode():
                output = model(torch.tensor([chunk]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            if step:
                steps.append(torch.stack(chosen)[:, 0].numpy().astype(np.uint8))
            chunk = [sampler.draw(tokens, output.logits[:, -1])]
            tokens = tokens + chunk
        offsets.append(len(steps))
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        PATH,
        topk_ids=np.stack(steps),
        seq_offsets=np.array(offsets),
        num_experts=np.int64(model.config.num_experts),
    )


if __name__ == "__main__":
    main()
