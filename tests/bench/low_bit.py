"""How fast low-bit products are, by number of tokens, beside bf16: `python -m tests.bench.low_bit`.

Weights come from memory: more of them are gone through than any cache holds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from compute_node import low_bit
from proto.weight_format import SCALE, SCALE_ZERO
from tests.bench.table import machine, show, spread

SHAPES = {  # [N, K]
    "OLMoE gate and up": (2048, 2048),
    "OLMoE down": (2048, 1024),
    "gpt-oss gate and up": (5760, 2880),
    "gpt-oss down": (2880, 2880),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
GROUP, ROUNDS, GONE_THROUGH_BYTES = 64, 5, 200_000_000

Weight = dict[str, torch.Tensor]


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(f"{machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    with torch.inference_mode():
        for name, (num_outputs, num_inputs) in SHAPES.items():
            measure(name, num_outputs, num_inputs)


def measure(name: str, num_outputs: int, num_inputs: int) -> None:
    num_weights = num_outputs * num_inputs
    bf16 = [{"w": torch.randn(num_outputs, num_inputs).bfloat16()} for _ in copies(2 * num_weights)]
    int8 = [random_int8(num_outputs, num_inputs) for _ in copies(num_weights)]
    int4 = [random_int4(num_outputs, num_inputs) for _ in copies(num_weights // 2)]
    rows = []
    for num_tokens in TOKENS:
        inputs = torch.randn(num_tokens, num_inputs).bfloat16()
        variants: list[tuple[list[Weight], Callable[[Weight], Any]]] = [
            (bf16, lambda weight, x=inputs: functional.linear(x, weight["w"])),
        ]
        for weights in (int8, int4):
            kernel = low_bit.KERNELS[weights[0]["w"].dtype]
            variants += [
                (weights, lambda weight, x=inputs, k=kernel: k.multiply(weight, "w", x)),
                (weights, lambda weight, x=inputs, k=kernel: x @ k.dequantise(weight, "w")),
            ]
        times = [time_us(weights, multiply) for weights, multiply in variants]
        rows.append([num_tokens, *(spread(found, 0) for found in times)])
        if num_tokens == 1:
            for found, weights in zip(times, (bf16, int8, int8, int4, int4), strict=True):
                found[:] = [weight_bytes(weights[0]) / value / 1e3 for value in found]
            speeds = ["GB/s at 1", *(spread(found) for found in times)]
    header = ["tokens", "bf16", "int8 kernel", "dequantised", "int4 kernel", "dequantised"]
    show(f"{name} [{num_outputs}, {num_inputs}], us a product", header, [*rows, speeds])


def copies(size_bytes: int) -> range:
    return range(max(2, GONE_THROUGH_BYTES // size_bytes))


def random_int8(num_outputs: int, num_inputs: int) -> Weight:
    codes = torch.randint(-127, 128, (num_outputs, num_inputs), dtype=torch.int8)
    return {"w": codes, "w" + SCALE: torch.rand(num_outputs).bfloat16()}


def random_int4(num_outputs: int, num_inputs: int) -> Weight:
    codes = torch.randint(0, 256, (num_outputs, num_inputs // 2), dtype=torch.uint8)
    scale_zero = torch.rand(num_inputs // GROUP, num_outputs, 2).bfloat16()
    return {"w": codes, "w" + SCALE_ZERO: scale_zero}


def weight_bytes(weight: Weight) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in weight.values())


def time_us(weights: list[Weight], multiply: Callable[[Weight], Any]) -> list[float]:
    """Mean of one pass over all weights, for every round."""
    multiply(weights[0])
    found = []
    for _ in range(ROUNDS):
        start_s = time.perf_counter()
        for weight in weights:
            multiply(weight)
        found.append((time.perf_counter() - start_s) / len(weights) * 1e6)
    return found


if __name__ == "__main__":
    main()
