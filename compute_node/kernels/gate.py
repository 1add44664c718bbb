"""The gate of experts as native entries compute it: a table of the activation of every bf16 number,
where that gives the bits of the experts module's own operations.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compute_node.kernels.prober import Prober, facts_of
from compute_node.kernels.verdicts import Verdict, same_bits
from compute_node.native import binding

logger = logging.getLogger(__name__)

_LANES = 16
_NUM_PROBED_ROWS = 8
_EVERY_BF16 = 1 << 16


class Gates:
    """Of one model: layers with one activation share a table, or they would push each other out of
    the CPU's cache.

    model: identifies the configuration that modules were made by
    """

    def __init__(self, prober: Prober, model: str) -> None:
        self._prober, self._model = prober, model
        self._by_key: dict[tuple[Any, ...], Tensor | None] = {}
        self._tables: list[Tensor] = []

    def table_of(self, module: Any, inner: int) -> Tensor | None:
        """[65536] bf16, by a number's bits; None: torch computes this module's gate, because it is
        not `act_fn(first half) * second half` or depends on where a number lies.
        """
        act_fn = getattr(module, "act_fn", None)
        if binding.load() is None or inner % _LANES or act_fn is None:
            return None
        facts = (self._model, facts_of(module), facts_of(act_fn))
        key = (*facts, inner, torch.get_num_threads())
        if key not in self._by_key:
            self._by_key[key] = self._find(module, inner, key)
        table = self._by_key[key]
        self._prober.num_modules["gate", table is not None] += 1
        return table

    def _find(self, module: Any, inner: int, key: tuple[Any, ...]) -> Tensor | None:
        verdict = self._prober.gate.ask(key, lambda: Verdict(_prove(module, inner)))
        if not verdict.way:
            return None
        table = _tabulate(module.act_fn)
        known = next((known for known in self._tables if same_bits(known, table)), None)
        if known is None:
            self._tables.append(table)
        return table if known is None else known


@torch.no_grad()
def _prove(module: Any, inner: int) -> bool:
    table = _tabulate(module.act_fn)
    is_table = table.dtype == torch.bfloat16 and table.shape == (_EVERY_BF16,)
    return (
        is_table
        and _ignores_the_place(module.act_fn, table)
        and _is_gate(module._apply_gate, table, inner)
    )


def _every_number() -> Tensor:
    return torch.arange(_EVERY_BF16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@torch.no_grad()
def _tabulate(act_fn: Callable[[Tensor], Tensor]) -> Tensor:
    return act_fn(_every_number())


def _ignores_the_place(act_fn: Callable[[Tensor], Tensor], table: Tensor) -> bool:
    """torch has a loop for neighbouring numbers and one for scattered ones: both must agree."""
    every = _every_number()
    scattered = act_fn(torch.stack([every, every], dim=1)[:, 0]).contiguous()
    same = table.view(torch.int16) == scattered.view(torch.int16)
    return bool((same | table.isnan() & scattered.isnan()).all())


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
