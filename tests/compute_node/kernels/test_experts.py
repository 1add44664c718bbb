"""One token through several experts at once: the bits of one expert after the other.

Planted faults seen red: activating rows together however long they are, the first expert's
down_proj for all.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compute_node.native import binding
from tests.matrices import bound


def experts_module(**changes: Any) -> Any:
    def gate(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    module = {"has_gate": True, "has_bias": False, "is_transposed": False, "_apply_gate": gate}
    return SimpleNamespace(**{**module, "act_fn": functional.gelu, **changes})


def experts(
    module: Any, inner: int, dtype: torch.dtype, hidden: int = 64
) -> list[dict[str, Tensor]]:
    up_name, rows = ("gate_up_proj", 2 * inner) if module.has_gate else ("up_proj", inner)
    shapes = {up_name: (rows, hidden), "down_proj": (hidden, inner)}
    made = []
    for _ in range(4):
        tensors = {}
        for name, shape in shapes.items():
            laid = shape[::-1] if module.is_transposed else shape
            tensors[name] = (torch.randn(laid) * 0.1).to(dtype)
            if module.has_bias:
                tensors[f"{name}_bias"] = torch.randn(shape[0]).to(dtype)
            setattr(module, name, torch.empty((4, *laid), dtype=dtype, device="meta"))
        made.append(tensors)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("inner", [32, 48, 96, 16384])
@pytest.mark.parametrize(
    "changes",
    [{}, {"has_gate": False}, {"has_bias": True}, {"is_transposed": True, "has_bias": True}],
    ids=["gated", "plain", "biased", "transposed"],
)
@torch.inference_mode()
def test_together_as_one_by_one(changes: dict[str, Any], inner: int, dtype: torch.dtype) -> None:
    module = experts_module(**changes)
    several, hidden = experts(module, inner, dtype), torch.randn(1, 64).to(dtype)
    kernels = bound(module, several[0])
    together = kernels.one_token(several, hidden, [1.0] * 4)
    one_by_one = torch.cat([kernels.feed_forward(tensors, hidden) for tensors in several])
    assert torch.equal(together, one_by_one)
    assert len(together.unique(dim=0)) == 4


@torch.inference_mode()
def test_torch_shares_out_no_row_of_several() -> None:
    """An activation may round otherwise where one thread's part of a tensor ends."""
    seen = []

    def gate(gate_up: Tensor) -> Tensor:
        seen.append(tuple(gate_up.shape))
        return gate_up.chunk(2, dim=-1)[0]

    module = experts_module(_apply_gate=gate)
    for inner in (96, 16384):
        several = experts(module, inner, torch.bfloat16)
        kernels = bound(module, several[0])
        kernels.one_token(several, torch.ones(1, 64).bfloat16(), [1.0] * 4)
    assert all(rows == 1 or rows * columns < 32768 for rows, columns in seen)
    by_amx = "amx_bf16" in Path("/proc/cpuinfo").read_text()  # torch adds up otherwise there
    assert any(rows == 4 for rows, _ in seen) or by_amx or binding.obstacle()
