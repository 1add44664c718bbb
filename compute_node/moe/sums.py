"""The weighted sum of one sequence's experts in one layer, added up in eager's order whatever order
and place they were computed in.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Protocol

import torch
from torch import Tensor

from compute_node.kernels.prompt import Prompt
from compute_node.kernels.variant_kernels import VariantKernels
from compute_node.moe.route import Route
from compute_node.store.memory import Borrowed
from proto import errors


class Sum(Protocol):
    """Of one sequence's rows. Experts may come in any order."""

    @property
    def experts(self) -> Container[int]:
        """Those that some token of it chose."""

    def add(self, wave: list[Borrowed]) -> None:
        """Compute with these, each of which some token chose; they stay valid only for the call."""

    def made(self, experts: Sequence[int]) -> Tensor:
        """What was added of these, ascending, for the sum of another box to take: [n, D], weighted,
        each expert's tokens, expert by expert.
        """

    def num_rows(self, experts: Sequence[int]) -> int:
        """That `made` gives of these."""

    def take(self, experts: Sequence[int], rows: Tensor) -> None:
        """What another box `made` of these, as if they had been added: [num_rows, D]."""

    def result(self) -> Tensor:
        """[T, D], once all were added or taken."""

    def so_far(self) -> Tensor | None:
        """[1, D], an estimate of the result from what was added; None: there is none."""


def sum_of(
    kernels: VariantKernels, num_experts: int, hidden: Tensor, route: Route, ids: list[list[int]]
) -> Sum:
    """ids: the route's once more"""
    if len(ids) == 1:
        experts = [e for e in ids[0] if e < num_experts]
        if len(set(experts)) == len(experts):
            gates = dict(zip(ids[0], route.weights[0].tolist(), strict=True))
            return OneTokenSum(kernels, hidden, gates)
    return ManyTokensSum(kernels, num_experts, hidden, route)


class OneTokenSum:
    """Adds in ascending expert order, whatever order they came in. No expert is named twice.

    hidden: [1, D]; gates: weight of each chosen expert
    """

    def __init__(self, kernels: VariantKernels, hidden: Tensor, gates: dict[int, float]) -> None:
        self.experts = gates
        self._kernels, self._hidden = kernels, hidden
        self._parts: list[Tensor] = []
        self._added: list[int] = []

    def add(self, wave: list[Borrowed]) -> None:
        if not wave:
            return
        for variant, records in _by_variant(wave).items():
            tensors = [borrowed.tensors for borrowed in records]
            chosen = [borrowed.key.expert for borrowed in records]
            weights = [self.experts[expert] for expert in chosen]
            kernels = self._kernels.of(variant)
            self._parts.append(kernels.one_token(tensors, self._hidden, weights))
            self._added += chosen

    def made(self, experts: Sequence[int]) -> Tensor:
        return torch.cat(self._parts)[[self._added.index(expert) for expert in experts]]

    def num_rows(self, experts: Sequence[int]) -> int:
        return len(experts)

    def take(self, experts: Sequence[int], rows: Tensor) -> None:
        self._parts.append(rows)
        self._added += experts

    def result(self) -> Tensor:
        if not self._added:
            return torch.zeros_like(self._hidden)
        rows = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)  # [E, D]
        order = sorted(range(len(self._added)), key=self._added.__getitem__)
        if order != list(range(len(order))):
            rows = rows[order]
        return self._kernels.exact.add_up(rows)

    def so_far(self) -> Tensor:
        """Weights of what was added stand for those of all."""
        if not self._added:
            return torch.zeros_like(self._hidden)
        added = sum(self.experts[expert] for expert in self._added)
        total = sum(self.experts.values())
        return torch.cat(self._parts).sum(dim=0, keepdim=True) * (total / added if added else 1.0)


class ManyTokensSum:
    """A prompt, and a token that names an expert twice (eager multiplies both choices at once,
    which rounds otherwise than one after the other): keeps each (token, k) output until all waves
    are through, then sums in eager's order.
    """

    def __init__(
        self, kernels: VariantKernels, num_experts: int, hidden: Tensor, route: Route
    ) -> None:
        self.experts = set(route.ids.flatten().tolist())
        self._kernels = kernels
        self._prompt = Prompt(hidden.contiguous(), route.ids, route.weights, num_experts)

    def add(self, wave: list[Borrowed]) -> None:
        for variant, records in _by_variant(wave).items():
            tensors = {borrowed.key.expert: borrowed.tensors for borrowed in records}
            self._kernels.of(variant).many_tokens(self._prompt, tensors)

    def made(self, experts: Sequence[int]) -> Tensor:
        return torch.cat([self._prompt.made(expert) for expert in experts])

    def num_rows(self, experts: Sequence[int]) -> int:
        return sum(len(self._prompt.places(expert)) for expert in experts)

    def take(self, experts: Sequence[int], rows: Tensor) -> None:
        counts = [len(self._prompt.places(expert)) for expert in experts]
        for expert, part in zip(experts, torch.split(rows, counts), strict=True):
            self._prompt.take(expert, part)

    def result(self) -> Tensor:
        return self._prompt.total()

    def so_far(self) -> None:
        return None


def add_wave(sums: Sequence[Sum], wave: list[Borrowed]) -> None:
    """To each what some token of it chose."""
    if len(sums) == 1:
        sums[0].add(wave)
        return
    for one in sums:
        if part := [borrowed for borrowed in wave if borrowed.key.expert in one.experts]:
            one.add(part)


def made_of(sums: Sequence[Sum], experts: Sequence[int]) -> Tensor:
    """What each made of those of these, ascending, that it chose, one after another: [n, D]."""
    parts = [one.made(chosen) for one in sums if (chosen := _of(one, experts))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def take_made(sums: Sequence[Sum], experts: Sequence[int], rows: Tensor) -> None:
    """What another box's `made_of` gave for these sequences. Raises MessageInvalid for another
    number of rows; then nothing was taken.
    """
    parts = [(one, chosen) for one in sums if (chosen := _of(one, experts))]
    counts = [one.num_rows(chosen) for one, chosen in parts]
    if len(rows) != sum(counts):
        raise errors.MessageInvalid(f"another box made {len(rows)} rows, not {sum(counts)}")
    if len(parts) == 1:
        parts[0][0].take(parts[0][1], rows)
        return
    for (one, chosen), part in zip(parts, torch.split(rows, counts), strict=True):
        one.take(chosen, part)


def _of(one: Sum, experts: Sequence[int]) -> list[int]:
    return [expert for expert in experts if expert in one.experts]


def _by_variant(wave: list[Borrowed]) -> dict[str, list[Borrowed]]:
    found: dict[str, list[Borrowed]] = {}
    for borrowed in wave:
        found.setdefault(borrowed.variant, []).append(borrowed)
    return found
