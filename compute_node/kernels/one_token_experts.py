"""One token through a wave of gated experts in one call of native one_token, where that gives the
bits of the experts module's own operations; found out for each module and shape on this machine.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compute_node.kernels import gemv, lossless, matrices
from compute_node.native import binding

logger = logging.getLogger(__name__)

_LANES = 16
_NUM_PROBED_ROWS = 8
_EVERY_BF16 = 1 << 16

_tables: weakref.WeakKeyDictionary[Any, Tensor | None] = weakref.WeakKeyDictionary()


def num_modules(native: bool) -> int:
    """Experts modules seen so far whose gate is in the kernel, or left to torch."""
    return [table is not None for table in _tables.values()].count(native)


def table_of(module: Any, tensors: dict[str, Tensor], hidden: Tensor) -> Tensor | None:
    """The activation of every bf16 number, for `feed_forward`; None: torch computes these experts.

    hidden: [1, D]
    """
    if not module.has_gate or module.is_transposed or module.has_bias:
        return None
    if hidden.dtype != torch.bfloat16:
        return None
    if not all(_is_exact(module, tensors, name) for name in ("gate_up_proj", "down_proj")):
        return None
    if module not in _tables:
        _, inner = matrices.shape_of(module, "down_proj")
        _tables[module] = table = _find_table(module, inner)
        by = "torch" if table is None else "native"
        logger.info("gate chosen", extra={"experts": type(module).__name__, "kernel": by})
    return _tables[module]


def _is_exact(module: Any, tensors: Mapping[str, Tensor], name: str) -> bool:
    if lossless.is_packed(tensors, name):
        return lossless.is_exact(tensors, name, matrices.shape_of(module, name))
    return tensors[name].dtype == torch.bfloat16 and gemv.is_exact(tensors[name])


def feed_forward(
    module: Any,
    experts: Sequence[dict[str, Tensor]],
    hidden: Tensor,
    gates: Sequence[float],
    table: Tensor,
) -> Tensor:
    """What each expert makes of the token, times its gate weight.

    experts: all as they are in the checkpoint, or all lossless
    hidden: [1, D]; gates: a weight an expert; table: from `table_of`

    Returns [E, D].
    """
    count, (num_outputs, inner) = len(experts), matrices.shape_of(module, "down_proj")
    gate_up, down = (
        [array for tensors in experts for array in lossless.arrays_of(tensors, name)]
        for name in ("gate_up_proj", "down_proj")
    )
    outputs = torch.empty((count, num_outputs), dtype=torch.bfloat16)
    scratch = torch.empty(3 * count * inner, dtype=torch.bfloat16)
    binding.kernels().experts(
        gemv.addresses(gate_up),
        gemv.addresses(down),
        lossless.is_packed(experts[0], "down_proj"),
        count,
        hidden.data_ptr(),
        table.data_ptr(),
        (ctypes.c_float * count)(*gates),
        scratch.data_ptr(),
        outputs.data_ptr(),
        num_outputs,
        inner,
        gemv.parallel(),
        torch.get_num_threads(),
    )
    return outputs


def add_rows(rows: Tensor) -> Tensor:
    """The rows added up from zero, in their order, rounded each time. rows: [E, D] as
    `feed_forward` returns them. Returns [1, D].
    """
    total = torch.empty((1, rows.shape[1]), dtype=torch.bfloat16)
    binding.kernels().add_rows(
        rows.data_ptr(), None, rows.shape[0], rows.shape[1], total.data_ptr()
    )
    return total


def _find_table(module: Any, inner: int) -> Tensor | None:
    """None unless the module's gate is `act_fn(first half) * second half`, and act_fn a function of
    one number wherever that lies.
    """
    act_fn = getattr(module, "act_fn", None)
    if binding.load() is None or inner % _LANES or act_fn is None:
        return None
    table = _tabulate(act_fn)
    if table is None or not _is_gate(module._apply_gate, table, inner):
        return None
    return next((known for known in _known_tables() if _same(known, table)), table)


def _known_tables() -> list[Tensor]:
    return [table for table in _tables.values() if table is not None]


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@torch.no_grad()
def _tabulate(act_fn: Callable[[Tensor], Tensor]) -> Tensor | None:
    """torch has a loop for neighbouring numbers and one for scattered ones: both must agree."""
    every = torch.arange(_EVERY_BF16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    neighbours = act_fn(every)
    scattered = act_fn(torch.stack([every, every], dim=1)[:, 0])
    if neighbours.dtype != torch.bfloat16 or neighbours.shape != every.shape:
        return None
    same = neighbours.view(torch.int16) == scattered.contiguous().view(torch.int16)
    same |= neighbours.isnan() & scattered.isnan()
    return neighbours if bool(same.all()) else None


@torch.no_grad()
def _is_gate(apply_gate: Callable[[Tensor], Tensor], table: Tensor, inner: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 30.0):
        shape = (_NUM_PROBED_ROWS, 2 * inner)
        made = torch.randn(shape, generator=generator).mul(scale).bfloat16()
        gate = made[:, :inner].contiguous().view(torch.int16).int().bitwise_and(_EVERY_BF16 - 1)
        expected = table[gate.long()] * made[:, inner:]
        found = apply_gate(made)
        if found.shape != expected.shape or not torch.equal(found, expected):
            return False
        if not torch.equal(_gate_of_kernel(made, table), expected):
            return False
    return True


def _gate_of_kernel(gate_up: Tensor, table: Tensor) -> Tensor:
    """[E, 2F] to [E, F]."""
    count, inner = gate_up.shape[0], gate_up.shape[1] // 2
    activated = torch.empty((count, inner), dtype=torch.bfloat16)
    binding.kernels().gate_of(
        gate_up.data_ptr(), table.data_ptr(), count, inner, activated.data_ptr()
    )
    return activated
