"""How fast products are by weight format and number of tokens: `python -m tests.bench.formats`.

Weights come from memory: more of them are gone through than any cache holds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compute_node.kernels import gemv
from compute_node.kernels.formats import lossless
from compute_node.kernels.formats.int4 import Int4Matrix
from compute_node.kernels.formats.int8 import Int8Matrix
from compute_node.kernels.formats.lossless import NativeLossless
from compute_node.kernels.formats.low_bit import LowBitMatrix
from compute_node.kernels.formats.matrix import MatrixSpec
from compute_node.kernels.prober import Prober
from compute_node.native import binding
from expert_store.offline.formats import lossless as encoder
from proto.weight_format import SCALE, SCALE_ZERO, lossless_tensors
from tests.bench.table import machine, show, spread

SHAPES = {  # [N, K]
    "OLMoE gate and up": (2048, 2048),
    "OLMoE down": (2048, 1024),
    "gpt-oss gate and up": (5760, 2880),
    "gpt-oss down": (2880, 2880),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
GROUP, ROUNDS, GONE_THROUGH_BYTES = 64, 5, 200_000_000

HEADER = [
    "tokens",
    *("bf16", "native", "lossless native", "unpacked"),
    *("int8 kernel", "dequantised", "int4 kernel", "dequantised"),
]

Weight = dict[str, Tensor]
Multiply = Callable[[Weight], Any]


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(f"{machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    with torch.inference_mode():
        for name, (num_outputs, num_inputs) in SHAPES.items():
            measure(name, num_outputs, num_inputs)


def measure(name: str, num_outputs: int, num_inputs: int) -> None:
    num_weights = num_outputs * num_inputs
    bf16 = [{"w": torch.randn(num_outputs, num_inputs).bfloat16()} for _ in copies(2 * num_weights)]
    packed = [pack_lossless(weight["w"]) for weight in bf16]
    int8 = [random_int8(num_outputs, num_inputs) for _ in copies(num_weights)]
    int4 = [random_int4(num_outputs, num_inputs) for _ in copies(num_weights // 2)]
    stored = (bf16, bf16, packed, packed, int8, int8, int4, int4)
    rows = []
    for num_tokens in TOKENS:
        inputs = torch.randn(num_tokens, num_inputs).bfloat16()
        variants = products((num_outputs, num_inputs), inputs)
        times = [
            time_us(weights, multiply) if multiply else []
            for weights, multiply in zip(stored, variants, strict=True)
        ]
        rows.append([num_tokens, *(spread(found, 0) if found else "" for found in times)])
        if num_tokens == 1:
            speeds = [
                [weight_bytes(weights[0]) / value / 1e3 for value in found]
                for found, weights in zip(times, stored, strict=True)
            ]
            in_bytes = ["GB/s at 1", *(spread(found) if found else "" for found in speeds)]
    show(f"{name} [{num_outputs}, {num_inputs}], us a product", HEADER, [*rows, in_bytes])


def products(shape: tuple[int, int], inputs: Tensor) -> list[Multiply | None]:
    """As HEADER has them; None: that kernel does not take so many tokens, or not here."""
    one = inputs.shape[0] == 1
    low_bit_ways: list[Multiply | None] = []
    for kind in (Int8Matrix, Int4Matrix):
        kernel: LowBitMatrix = kind(spec_of(shape), Prober())
        low_bit_ways += [
            lambda weight, k=kernel: k.multiply(weight, inputs),
            lambda weight, k=kernel: inputs @ k.dequantise(weight),
        ]
    packed = NativeLossless(spec_of(shape), Prober())
    native = one and binding.load() is not None
    return [
        lambda weight: functional.linear(inputs, weight["w"]),
        (lambda weight: gemv.multiply([weight["w"]], inputs)) if native else None,
        (lambda weight: packed.multiply([weight], inputs)) if native else None,
        lambda weight: functional.linear(inputs, lossless.unpack(weight, "w", shape)),
        *low_bit_ways,
    ]


def spec_of(shape: tuple[int, int]) -> MatrixSpec:
    return MatrixSpec("w", shape, False, False, torch.uint8, torch.bfloat16)


def pack_lossless(matrix: Tensor) -> Weight:
    room = max(1, encoder.count_outliers(matrix))
    names = [f"w{suffix}" for suffix, *_ in lossless_tensors(*matrix.shape, room)]
    return dict(zip(names, encoder.encode(matrix, room), strict=True))


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
