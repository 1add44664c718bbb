"""Several tokens by native gemm: torch's bits where it is trusted, and trusted only there.

Planted faults seen red: an accumulator beyond the last column, accumulators not added up, tokens
done twice, no bias, outputs of the first rows only, accumulators of 512 columns, a wrong order
trusted; more tokens than there is room for, strides of weights or tokens ignored; the token and its
place mixed up, another token's gate weight, tokens of another expert or in another order; of a
lossless matrix, the first tile of each panel alone; the last expert of a wave left out, one scratch
for two threads; of more tokens than go through at once, the first ones again; rows added up in the
order of places, the last tokens left out; idle work that does not stop for a request,
a verdict of it that the bound matrix never learns, products tried out while a prompt waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.moe import _default_apply_gate

from compute_node.kernels import gemm
from compute_node.kernels.prober import Prober
from compute_node.kernels.prompt import Prompt, combine
from compute_node.kernels.torch_experts import TorchExperts
from compute_node.native import binding
from tests.compute_node.kernels.formats.test_lossless import packed, packed_expert
from tests.compute_node.kernels.test_gemv import inputs, matrices, needs_kernel, same_bits
from tests.matrices import bound, matrix

pytestmark = pytest.mark.usefixtures("threads")
SHAPES = [(192, 256), (17, 1024), (48, 1536), (48, 2048), (300, 5120)]
TOKENS = (2, 3, 12, 33, 64, 300)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, prober: Prober) -> Tensor:
    tensors = {"w": weight} if bias is None else {"w": weight, "w_bias": bias}
    shape = (weight.shape[0], weight.shape[1])
    output: Tensor = matrix("exact", tensors, shape, prober).linear(tensors, x)
    return output


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_of_torch(shape: tuple[int, int]) -> None:
    prober = Prober()
    weight, bias = matrices(shape, 2)[1], torch.randn(shape[0]).bfloat16()
    for num_tokens in TOKENS:
        x = inputs(shape[1], num_tokens)
        for b in (None, bias):
            assert same_bits(linear(x, weight, b, prober), functional.linear(x, weight, b))
    if binding.isa() == binding.PORTABLE:  # torch's threads part odd numbers in another way
        assert prober.gemm.count(native=True) >= 2 * len([12, 64, 300])
    else:
        assert prober.gemm.count(native=True) == 2 * len(TOKENS)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(3, 64), torch.ones(64, 64)),
        (torch.ones(3, 48).bfloat16(), torch.ones(64, 48).bfloat16()),
        (torch.ones(257, 64).bfloat16(), torch.ones(64, 64).bfloat16()),
        (torch.ones(3, 32).bfloat16(), torch.ones(64, 64).bfloat16()[:, :32]),
        (torch.ones(64, 3).bfloat16().T, torch.ones(64, 64).bfloat16()),
    ],
    ids=["float32", "columns", "work", "strides", "transposed tokens"],
)
def test_what_the_kernel_cannot_take_is_left_to_torch(
    x: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "multiply", None)
    monkeypatch.setattr(gemm, "MAX_WORK", 256 * 64 * 64)
    assert torch.equal(linear(x, weight, None, Prober()), functional.linear(x, weight))


@needs_kernel
def test_other_orders_of_addition_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """And torch multiplies then."""
    weight, x = matrices((96, 256), 2)[1], inputs(256, 5)
    honest = gemm.multiply

    def backwards(x: Tensor, weight: Tensor, bias: Tensor | None, step: int) -> Tensor:
        return honest(x.flip(1).contiguous(), weight.flip(1).contiguous(), bias, step)

    monkeypatch.setattr(gemm, "multiply", backwards)
    prober = Prober()
    assert same_bits(linear(x, weight, None, prober), functional.linear(x, weight))
    assert prober.gemm.count(native=False) == 1


class Experts(SimpleNamespace):
    """What kernels ask of an experts module."""

    has_gate, has_bias, is_transposed = True, False, False
    act_fn = torch.nn.SiLU()

    def __hash__(self) -> int:
        return id(self)

    _apply_gate = _default_apply_gate


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


@needs_kernel
@pytest.mark.parametrize("is_lossless", [False, True], ids=["exact", "lossless"])
@pytest.mark.parametrize(
    "waves",
    [lambda experts: [experts], lambda experts: [experts[:1], experts[1:]]],
    ids=["a thread an expert", "all threads an expert"],
)
@torch.inference_mode()
def test_a_prompt_through_its_experts(
    waves: Callable[[list[int]], list[list[int]]],
    is_lossless: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one call a wave, the bits of torch's own operations; nobody's token stays zero."""
    num_tokens, num_experts, top_k, hidden_size, inner = 24, 5, 2, 64, 96
    topk_ids = torch.rand(num_tokens, num_experts - 1).topk(top_k).indices  # the last has none
    topk_ids[3, 1] = num_experts  # transformers' mark for none
    for dtype in (torch.float32, torch.bfloat16):
        weights = torch.rand(num_tokens, top_k).to(dtype)
        x = torch.randn(num_tokens, hidden_size).bfloat16()
        module = Experts(
            gate_up_proj=meta(num_experts, 2 * inner, hidden_size),
            down_proj=meta(num_experts, hidden_size, inner),
        )
        prompts = [Prompt(x, topk_ids, weights, num_experts) for _ in range(2)]
        experts = {
            expert: {
                "gate_up_proj": (torch.randn(2 * inner, hidden_size) * 0.2).bfloat16(),
                "down_proj": (torch.randn(hidden_size, inner) * 0.2).bfloat16(),
            }
            for expert in set(topk_ids.flatten().tolist()) - {num_experts}
        }
        stored = {
            expert: packed_expert(tensors) if is_lossless else tensors
            for expert, tensors in experts.items()
        }
        kernels = bound(module, stored[0], kind="lossless" if is_lossless else "exact")
        with monkeypatch.context() as patched:
            if binding.isa() != binding.PORTABLE:  # which leaves odd numbers of tokens to torch
                patched.setattr(TorchExperts, "feed_forward", None)
            for wave in waves(sorted(stored)):
                kernels.many_tokens(prompts[0], {expert: stored[expert] for expert in wave})
        by_torch = TorchExperts(module, kernels._up, kernels._down)  # type: ignore[attr-defined]
        by_torch.many_tokens(prompts[1], stored)
        assert same_bits(prompts[0].outputs, prompts[1].outputs)
        computed = prompts[0].outputs.ne(0).any(dim=2)
        assert computed.sum() == num_tokens * top_k - 1 and not computed[3, 1]


@needs_kernel
@pytest.mark.parametrize(("num_tokens", "columns"), [(1, 64), (40, 64), (515, 256), (8, 72)])
def test_a_tokens_outputs_are_added_up_by_expert(num_tokens: int, columns: int) -> None:
    """As eager's index_add_ over ascending experts; 72 columns are left to torch."""
    topk_ids = torch.rand(32, num_tokens).topk(4, dim=0).indices.T  # strides of a column
    outputs = torch.randn(num_tokens, 4, columns).bfloat16()
    outputs[0, :, 0] = -0.0
    expected = torch.zeros(num_tokens, columns).bfloat16()
    for expert in range(32):
        token, place = (topk_ids == expert).nonzero(as_tuple=True)
        expected.index_add_(0, token, outputs[token, place])
    assert same_bits(combine(outputs, topk_ids), expected)


@pytest.fixture
def left_to_themselves() -> Iterator[None]:
    if binding.isa() != binding.PORTABLE:
        pytest.skip("portable entries are not in charge")
    before = binding.setting()
    binding.use("auto")
    yield
    binding.use(before)


@pytest.mark.parametrize("kind", ["exact", "lossless"])
@pytest.mark.usefixtures("left_to_themselves")
def test_left_to_themselves_portable_products_are_tried_when_idle(kind: str) -> None:
    """Red when a node's first prompt tries out every number of tokens, and when a bound matrix
    keeps what it was answered before.
    """
    weight, prober = matrices((192, 256))[0], Prober()
    tensors = packed(weight) if kind == "lossless" else {"w": weight}
    bound, x = matrix(kind, tensors, (192, 256), prober), inputs(256, 8)
    assert bound.native.step_of(tensors, 8) == 0 and prober.num_proofs == 0
    prober.prove_put_off(lambda: False)
    assert prober.num_proofs == 1
    assert bound.native.step_of(tensors, 8) > 0
    assert same_bits(bound.linear(tensors, x), functional.linear(x, weight))


@pytest.mark.usefixtures("left_to_themselves")
def test_idle_work_ends_between_products_and_goes_on_later() -> None:
    """Red when a request waits for all that was put off."""
    weight, prober, asked = {"w": matrices((192, 256))[0]}, Prober(), iter(range(100))
    bound = matrix("exact", weight, (192, 256), prober)
    for num_tokens in (8, 12):
        bound.native.step_of(weight, num_tokens)
    prober.prove_put_off(lambda: next(asked) >= 3)
    assert next(asked) == 4 and prober.num_proofs == 0
    prober.prove_put_off(lambda: False)
    assert prober.num_proofs == 2
