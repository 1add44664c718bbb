"""Every entry of the table, by the portable code and by what this CPU has: right within rounding,
whatever the order of additions.

Planted faults seen red: the last of 16 rows left out, columns beyond a multiple of 64 left out,
outliers left as they were, the first matrix's bias for all, an accumulator not added to those
before it, the first expert's gate for all, rows as they lie, a norm without its weight,
rows of sums folded in pairs beyond those there are, sums of odd columns taken for even ones.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from compute_node.kernels import gemv
from compute_node.kernels.prompt import Prompt
from compute_node.kernels.prompt_entry import Share, compute
from compute_node.native import binding
from tests.compute_node.kernels.formats.test_lossless import packed

ROUNDING = 2.0**-8  # of a bf16 number, half of its last bit
SHAPES = [(17, 96), (16, 64), (300, 1056)]


@pytest.fixture(params=["auto", "portable", "portable_avx2_entries", "portable_entries"])
def entries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Those of a setting, or of a table that another CPU would have."""
    if binding.obstacle():
        pytest.skip(binding.obstacle())
    before = binding.setting()
    if request.param in get_args(binding.Setting):
        binding.use(request.param)
    else:
        table = another_table(request.param)
        binding.kernels.cache_clear()
        monkeypatch.setattr(binding, "load", lambda: table)
    yield binding.kernels()
    monkeypatch.undo()
    binding.use(before)


def another_table(name: str) -> Any:
    if "avx2" in name and " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU cannot run it")
    library = binding._open()
    assert library is not None
    return binding._Table.in_dll(library, name)


def addresses(tensors: list[Tensor]) -> Any:
    return gemv.addresses(tensors)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def check(found: Tensor, expected: Tensor, sizes: Tensor | float = 0.0) -> None:
    """sizes: of what was added up; float32 sums of it lose as much as their number of bits."""
    allowed = expected.abs() * ROUNDING + torch.as_tensor(sizes) * 2.0**-18
    assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("is_lossless", [False, True], ids=["exact", "lossless"])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_token(entries: Any, shape: tuple[int, int], is_lossless: bool) -> None:
    (rows, columns), count = shape, 3
    weights, biases = [drawn(*shape) for _ in range(count)], [drawn(rows) for _ in range(count)]
    weights[1][2, 5], weights[1][-1, -1] = 1e-20, 1e3  # outliers of twelve bits
    inputs, outputs = drawn(count, columns), torch.empty(count, rows, dtype=torch.bfloat16)
    arrays = [part for w in weights for part in (packed(w).values() if is_lossless else [w])]
    (entries.lossless_gemv if is_lossless else entries.gemv)(
        addresses(arrays), addresses(biases), count, inputs.data_ptr(), columns,
        outputs.data_ptr(), rows, columns, gemv.parallel(), 2,
    )  # fmt: skip
    for weight, bias, x, found in zip(weights, biases, inputs, outputs, strict=True):
        products = weight.double() * x.double()
        check(found, products.sum(1) + bias.double(), products.abs().sum(1))


def test_one_matrix(entries: Any) -> None:
    weight, x, output = drawn(50, 160), drawn(160), torch.empty(50, dtype=torch.bfloat16)
    entries.gemv_one(
        weight.data_ptr(), None, x.data_ptr(), output.data_ptr(), 50, 160, gemv.parallel(), 1
    )
    products = weight.double() * x.double()
    check(output, products.sum(1), products.abs().sum(1))


@pytest.mark.parametrize("is_lossless", [False, True], ids=["exact", "lossless"])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 19, 300])
@pytest.mark.parametrize("shape", SHAPES)
def test_several_tokens(
    entries: Any, shape: tuple[int, int], num_tokens: int, is_lossless: bool
) -> None:
    rows, columns = shape
    weight, bias, x = drawn(*shape), drawn(rows), drawn(num_tokens, columns)
    weight[2, 5] = 1e-20
    outputs = torch.empty(num_tokens, rows, dtype=torch.bfloat16)
    arrays = list(packed(weight).values()) if is_lossless else [weight]
    entries.gemm(
        addresses(arrays), is_lossless, bias.data_ptr(), x.data_ptr(), outputs.data_ptr(),
        num_tokens, rows, columns, 512, gemv.parallel(), 2,
    )  # fmt: skip
    sizes = x.double().abs() @ weight.double().abs().T
    check(outputs, x.double() @ weight.double().T + bias.double(), sizes)


@pytest.mark.parametrize("shape", [*SHAPES, (33, 40)])
def test_matrices_come_back(entries: Any, shape: tuple[int, int]) -> None:
    weight, output = drawn(*shape), torch.empty(*shape, dtype=torch.bfloat16)
    weight[0, :3] = torch.tensor([1e30, -1e-30, 0.0]).bfloat16()
    arrays = list(packed(weight).values())
    entries.lossless_unpack(addresses(arrays), output.data_ptr(), *shape, gemv.parallel(), 2)
    assert torch.equal(output.view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize("form", [0, 1, 2])
@pytest.mark.parametrize("columns", [64, 112, 2880])
def test_norms(entries: Any, columns: int, form: int) -> None:
    x, weight, epsilon = drawn(3, columns), drawn(columns), 1e-5
    found = torch.empty(3, columns, dtype=torch.bfloat16)
    wide = torch.empty(3, columns)
    shape = (3, columns, form)
    entries.rms_norm(x.data_ptr(), weight.data_ptr(), epsilon, *shape, found.data_ptr())
    entries.rms_norm_wide(x.data_ptr(), weight.data_ptr(), epsilon, *shape, wide.data_ptr())
    scale = (x.double().square().mean(1, keepdim=True) + epsilon).rsqrt()
    expected = x.double() * scale * (weight.double() + (form == 2))
    assert torch.allclose(wide.double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.allclose(found.double(), expected, rtol=2 * ROUNDING, atol=1e-7)


def test_gates(entries: Any) -> None:
    """The activation comes from the table: here each number's double."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    table, made = every * 2, drawn(3, 2 * 48)
    found = torch.empty(3, 48, dtype=torch.bfloat16)
    entries.gate_of(made.data_ptr(), table.data_ptr(), 3, 48, found.data_ptr())
    assert torch.equal(found, made[:, :48] * 2 * made[:, 48:])


@pytest.mark.parametrize("is_lossless", [False, True], ids=["exact", "lossless"])
def test_experts_of_one_token(entries: Any, is_lossless: bool) -> None:
    count, hidden, inner = 3, 96, 64
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    up = [drawn(2 * inner, hidden) for _ in range(count)]
    down = [drawn(hidden, inner) for _ in range(count)]
    x, gates = drawn(hidden), [0.5, 2.0, -1.0]
    scratch = torch.empty(3 * count * inner, dtype=torch.bfloat16)
    outputs = torch.empty(count, hidden, dtype=torch.bfloat16)
    stored = [
        [part for m in side for part in (packed(m).values() if is_lossless else [m])]
        for side in (up, down)
    ]
    entries.experts(
        *map(addresses, stored), is_lossless, count, x.data_ptr(), every.data_ptr(),
        (ctypes.c_float * count)(*gates), scratch.data_ptr(), outputs.data_ptr(), hidden, inner,
        gemv.parallel(), 1,
    )  # fmt: skip
    for number in range(count):
        made = up[number].double() @ x.double()
        activated = made[:inner] * made[inner:]
        sizes = down[number].double().abs() @ activated.abs()
        check(
            outputs[number],
            down[number].double() @ activated * gates[number],
            sizes * 2.0**12,  # rounded to bf16 thrice on the way
        )


@pytest.mark.parametrize("columns", [16, 64, 208])
def test_rows_are_added_in_order_with_a_rounding_each(entries: Any, columns: int) -> None:
    rows, order = drawn(5, columns), torch.tensor([3, 0, 4, 1, 2])
    total = torch.empty(columns, dtype=torch.bfloat16)
    entries.add_rows(rows.data_ptr(), order.data_ptr(), 5, columns, total.data_ptr())
    expected = torch.zeros(columns).bfloat16()
    for row in order.tolist():
        expected = expected + rows[row]
    assert torch.equal(total, expected)


def test_a_prompt_and_each_tokens_sum(entries: Any) -> None:
    """`prompt_experts` and `add_rows_of_each`, through what calls them."""
    num_tokens, num_experts, hidden, inner = 24, 4, 64, 96
    ids = torch.rand(num_tokens, num_experts).topk(2).indices
    weights, x = torch.rand(num_tokens, 2), drawn(num_tokens, hidden)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    table = torch.nn.functional.silu(every)
    tensors = {
        expert: {
            "gate_up_proj": drawn(2 * inner, hidden) * 0.2,
            "down_proj": drawn(hidden, inner) * 0.2,
        }
        for expert in range(num_experts)
    }
    prompt = Prompt(x, ids, weights, num_experts)
    shares = [
        Share([made["gate_up_proj"]], [made["down_proj"]], prompt.places(expert), 64, 96)
        for expert, made in tensors.items()
    ]
    compute(prompt, shares, table, inner, is_lossless=False)
    expected = torch.zeros(num_tokens, hidden).double()
    for token in range(num_tokens):
        for place in range(2):
            made = tensors[int(ids[token, place])]
            up = made["gate_up_proj"].double() @ x[token].double()
            activated = torch.nn.functional.silu(up[:inner]) * up[inner:]
            expected[token] += made["down_proj"].double() @ activated * weights[token, place]
    assert torch.allclose(prompt.total().double(), expected, rtol=0.05, atol=0.05)
