"""Norms and experts of one token by native one_token: torch's bits, and trusted only there.

Planted faults seen red: a norm's four sums added in another order, norms compared after rounding
alone, its inputs' dtype or strides not looked at, the sum over experts rounded once, gate weights
left out, a gate not tried out, an activation tabulated of neighbouring numbers alone, a table of
its own for each layer, lossless arrays taken for plain ones, a module's numbers
left out of what verdicts are kept by, a norm's form found with the weight that it has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextRMSNorm,
    Qwen3NextRMSNormGated,
)

from compute_node.kernels import gemv, one_token_norm
from compute_node.kernels.gate import Gates
from compute_node.kernels.native_experts import NativeExperts
from compute_node.kernels.one_token_norm import Form, OneTokenNorm
from compute_node.kernels.prober import Prober
from compute_node.kernels.torch_experts import TorchExperts, weighted
from compute_node.kernels.verdicts import same_bits
from compute_node.native import binding
from tests.compute_node.kernels.formats.test_lossless import packed_expert
from tests.matrices import bound

needs_kernel = pytest.mark.skipif(
    binding.obstacle() != "" or "amx_bf16" in Path("/proc/cpuinfo").read_text(),
    reason=binding.obstacle() or "torch multiplies with AMX here",
)
pytestmark = [needs_kernel, pytest.mark.usefixtures("inference")]
NORMS: dict[type[nn.Module], Form] = {
    Qwen3MoeRMSNorm: Form.AFTER_ROUNDING,
    GptOssRMSNorm: Form.BEFORE_ROUNDING,
    Qwen3NextRMSNorm: Form.ONE_PLUS,
}
D, F, E = 96, 64, 5


@pytest.fixture
def inference() -> Any:
    with torch.inference_mode():
        yield


def norm(kind: Callable[..., nn.Module], width: int) -> nn.Module:
    torch.manual_seed(width)
    made = kind(width, eps=1e-6).bfloat16()
    made.weight.data.normal_(0.5, 0.5)  # type: ignore[operator, union-attr]
    return made


def tokens(*shape: int) -> Tensor:
    """Rows of very different sizes."""
    return (torch.randn(shape) * torch.exp2(torch.randint(-6, 6, (*shape[:-1], 1)))).bfloat16()


@pytest.mark.parametrize("width", [16, 96, 2048, 2880])
@pytest.mark.parametrize("kind", NORMS)
def test_norms_keep_their_bits(kind: type[nn.Module], width: int) -> None:
    model = nn.Sequential(norm(kind, width))
    inputs = [tokens(1, 1, width), tokens(1, 1, 4, width), tokens(1, 300, width)]
    inputs += [tokens(1, 4, 2 * width)[..., :width], tokens(1, 1, width).float()]
    before = [model(x) for x in inputs]
    prober = Prober()
    one_token_norm.adopt(model, prober)
    assert type(model[0]) is kind and isinstance(model[0].forward, OneTokenNorm)
    assert model[0].forward._form == NORMS[kind]
    for x, expected in zip(inputs, before, strict=True):
        found = model(x)
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert prober.num_modules["norm", True] == 1


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_is_known_whatever_its_weight(kind: type[nn.Module]) -> None:
    """Red when the form is found with weights of 1, which every form treats alike: the verdict
    counts for another layer's norm, too.
    """
    model, prober = nn.Sequential(norm(kind, 96), norm(kind, 96)), Prober()
    model[0].weight.data.fill_(1.0)  # type: ignore[operator, union-attr]
    x = tokens(1, 1, 96)
    before = [module(x) for module in model]
    one_token_norm.adopt(model, prober)
    assert [module.forward._form for module in model] == [NORMS[kind]] * 2
    assert prober.norm.num_proofs == 1
    assert all(torch.equal(m(x), b) for m, b in zip(model, before, strict=True))


def test_one_token_does_not_reach_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(norm(Qwen3MoeRMSNorm, 96))
    one_token_norm.adopt(model, Prober())
    model(tokens(1, 1, 96))
    monkeypatch.setattr(model[0].forward, "_by_torch", None)
    model(tokens(1, 1, 96))
    with pytest.raises(TypeError):
        model(tokens(1, 300, 96))


def test_rows_whose_bits_differ_are_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(norm(Qwen3MoeRMSNorm, 96))
    x = tokens(1, 1, 4, 96)
    expected = model(x)
    one_token_norm.adopt(model, Prober())
    monkeypatch.setattr(one_token_norm, "norm", lambda inputs, *_: inputs)
    assert torch.equal(model(x), expected)
    assert [r.rows for r in caplog.records if r.message == "norm left to torch"] == [4]  # type: ignore[attr-defined]


class OtherOrder(Qwen3MoeRMSNorm):
    """Its sum of squares goes the other way round: seldom seen once it is rounded to bf16."""

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        total = wide.flip(-1).pow(2).cumsum(-1)[..., -1:]
        scaled = wide * torch.rsqrt(total / len(self.weight) + self.variance_epsilon)
        return self.weight * scaled.to(hidden.dtype)


class NoMean(Qwen3MoeRMSNorm):
    """A norm by the largest number."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * (hidden / hidden.abs().amax(-1, keepdim=True))


@pytest.mark.parametrize("kind", [OtherOrder, NoMean, Qwen3NextRMSNormGated, nn.LayerNorm])
def test_what_is_no_such_norm_is_left_to_torch(kind: type[nn.Module]) -> None:
    model = nn.Sequential(norm(kind, 1024))
    one_token_norm.adopt(model, Prober())
    assert "forward" not in vars(model[0])


def test_norms_of_widths_and_dtypes_the_kernel_cannot_take(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(norm(Qwen3MoeRMSNorm, 40), norm(Qwen3MoeRMSNorm, 64).float())
    prober = Prober()
    with caplog.at_level(logging.INFO):
        one_token_norm.adopt(model, prober)
    assert not any("forward" in vars(module) for module in model)
    assert prober.num_modules["norm", False] == 2
    assert [r.torch for r in caplog.records if r.message == "norms chosen"] == [2]  # type: ignore[attr-defined]


class Gated(nn.Module):
    """What transformers' experts modules tell of themselves."""

    has_gate, has_bias, is_transposed = True, False, False

    def __init__(self, act: str = "silu", inner: int = F) -> None:
        super().__init__()
        self.gate_up_proj = torch.empty(E, 2 * inner, D, device="meta", dtype=torch.bfloat16)
        self.down_proj = torch.empty(E, D, inner, device="meta", dtype=torch.bfloat16)
        self.act_fn = ACT2FN[act]

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        product: Tensor = self.act_fn(gate) * up
        return product


class Interleaved(Gated):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        product: Tensor = self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]
        return product


class Clamped(Gated):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return super()._apply_gate(gate_up.clamp(max=7.0))


def weights(inner: int = F) -> list[dict[str, Tensor]]:
    torch.manual_seed(inner)
    return [
        {
            "gate_up_proj": (torch.randn(2 * inner, D) * 0.3).bfloat16(),
            "down_proj": (torch.randn(D, inner) * 0.3).bfloat16(),
        }
        for _ in range(E)
    ]


def table_of(module: Gated, tensors: dict[str, Tensor], prober: Prober | None = None) -> Any:
    kernels = bound(module, tensors, prober)
    return kernels._table if isinstance(kernels, NativeExperts) else None


@pytest.mark.parametrize("is_lossless", [False, True], ids=["exact", "lossless"])
@pytest.mark.parametrize("act", ["silu", "relu", "relu2"])
def test_experts_keep_their_bits(
    act: str, is_lossless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, experts, gates = Gated(act), weights(), [0.5, 0.123, 1.7, 0.001, 0.25]
    hidden = tokens(1, D)
    stored = [packed_expert(tensors) for tensors in experts] if is_lossless else experts
    kernels = bound(module, stored[0], kind="lossless" if is_lossless else "exact")
    rows = [kernels.feed_forward(tensors, hidden) for tensors in stored]
    kernels.one_token(stored, hidden, gates)  # compares them
    monkeypatch.setattr(TorchExperts, "feed_forward", None)
    found = kernels.one_token(stored, hidden, gates)
    expected = weighted(rows, gates)
    assert same_bits(found, expected)
    total = torch.zeros(1, D, dtype=torch.bfloat16)
    for row in expected[:, None].unbind():
        total += row
    assert same_bits(kernels.add_up(found), total)


def test_experts_with_other_bits_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, hidden = bound(Gated(), weights()[0]), tokens(1, D)
    right = NativeExperts._all_in_one
    monkeypatch.setattr(NativeExperts, "_all_in_one", lambda *args: right(*args) * 2)
    found = kernels.one_token(weights(), hidden, [1.0] * E)
    rows = [kernels.feed_forward(tensors, hidden) for tensors in weights()]
    assert same_bits(found, torch.cat(rows))


@pytest.mark.parametrize("kind", [Interleaved, Clamped])
def test_other_gates_are_left_to_torch(kind: type[Gated], caplog: pytest.LogCaptureFixture) -> None:
    prober = Prober()
    with caplog.at_level(logging.INFO):
        assert table_of(kind(), weights()[0], prober) is None
    facts = [(r.entry, r.kernel) for r in caplog.records if r.message == "kernel chosen"]  # type: ignore[attr-defined]
    assert facts == [("gate", "torch")]
    assert prober.num_modules["gate", False] == 1


class Limited(Gated):
    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return super()._apply_gate(gate_up.clamp(max=self.limit))


def test_gates_that_differ_in_a_number_share_no_verdict() -> None:
    prober = Prober()
    assert table_of(Limited(float("inf")), weights()[0], prober) is not None
    assert table_of(Limited(7.0), weights()[0], prober) is None
    assert prober.gate.num_proofs == 2


def test_an_activation_that_depends_on_the_place_is_left_to_torch() -> None:
    """torch's gelu of a small number is another beside others than alone."""
    assert table_of(Gated("gelu_pytorch_tanh"), weights()[0]) is None


def test_experts_the_kernel_cannot_take_are_left_to_torch() -> None:
    module, experts = Gated(), weights()
    wide = {name: tensor.float() for name, tensor in experts[0].items()}
    assert table_of(module, wide) is None
    assert table_of(Gated(inner=40), weights(40)[0]) is None
    module.is_transposed = True
    assert table_of(module, experts[0]) is None


def test_layers_with_one_activation_share_a_table() -> None:
    """A table a layer would push the others out of the CPU's cache."""
    prober = Prober()
    gates = Gates(prober, "")
    tables = [
        bound(Gated(inner=inner), weights(inner)[0], prober, gates)._table  # type: ignore[attr-defined]
        for inner in (F, F, 2 * F)
    ]
    assert tables[0] is tables[1] is tables[2] is not None
    assert prober.gate.num_proofs == 2


def test_matrices_multiply_as_before() -> None:
    weight = (torch.randn(96, 64) * 0.1).bfloat16()
    assert gemv.verdict_of(Prober(), weight).way
    x = tokens(1, 1, 64)
    expected = torch.nn.functional.linear(x, weight)
    assert same_bits(gemv.multiply_one(weight, x, None), expected)
