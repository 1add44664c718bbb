"""The RMS norms of a model: one token goes through native one_token where that gives the module's
own bits, which is found out for each module and number of rows on this machine.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections import Counter
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from compute_node.native import binding

logger = logging.getLogger(__name__)

_LANES = 16
_MAX_ROWS = 256  # heads of a token; more are a prompt's
_UNROUNDED_ROWS = 16
_ROUNDED_NUMBERS = 1 << 12
_EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon")

_num_modules: Counter[bool] = Counter()
_classes: dict[type[nn.Module], type[nn.Module]] = {}


class Form(IntEnum):
    """What becomes of the weight; native one_token has the same numbers."""

    AFTER_ROUNDING = 0
    BEFORE_ROUNDING = 1
    ONE_PLUS = 2


class OneTokenNorm(nn.Module):
    """Comes before a norm's own class, which computes whatever this leaves to it."""

    def flashmoe_adopt(self, form: Form, epsilon: float) -> None:
        self.flashmoe_form, self.flashmoe_epsilon = int(form), epsilon
        self.flashmoe_same_bits: dict[int, bool] = {}  # by number of rows

    def forward(self, inputs: Tensor, *others: Any, **options: Any) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        columns = weight.shape[0]
        rows = inputs.numel() // columns
        if rows > _MAX_ROWS or others or options or not _can_take(inputs, columns):
            return self._by_torch(inputs, *others, **options)
        if rows not in self.flashmoe_same_bits:
            self.flashmoe_same_bits[rows] = self._gives_same_bits(weight, rows)
        if not self.flashmoe_same_bits[rows]:
            return self._by_torch(inputs)
        return norm(inputs, weight, self.flashmoe_epsilon, self.flashmoe_form)

    def _by_torch(self, inputs: Tensor, *others: Any, **options: Any) -> Tensor:
        output: Tensor = super().forward(inputs, *others, **options)
        return output

    def _gives_same_bits(self, weight: Tensor, rows: int) -> bool:
        epsilon, form = self.flashmoe_epsilon, self.flashmoe_form
        same = all(
            same_bits(self._by_torch(probe), norm(probe, weight, epsilon, form))
            for probe in _probes(rows, len(weight))
        )
        if not same:
            logger.warning("norm left to torch", extra={"width": len(weight), "rows": rows})
        return same


def adopt(model: nn.Module) -> None:
    """Every module that turns out to be an RMS norm becomes such a one."""
    _num_modules.clear()
    for module in list(model.modules()):
        if not _looks_like_a_norm(module):
            continue
        epsilon = _epsilon(module)
        form = find_form(module, epsilon)
        _num_modules[form is not None] += 1
        if form is not None:
            module.__class__ = _one_token_class(type(module))
            module.flashmoe_adopt(form, epsilon)  # type: ignore[operator]
    logger.info("norms chosen", extra={"native": _num_modules[True], "torch": _num_modules[False]})


def num_modules(native: bool) -> int:
    """Norms of the model loaded last that the kernel computes, or that it leaves to torch."""
    return _num_modules[native]


def find_form(module: nn.Module, epsilon: float) -> Form | None:
    """Whose bits are the module's own. None: torch computes it."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if binding.load() is None or not _can_take(weight, len(weight)):
        return None
    wide = copy.deepcopy(module).float()
    for form in Form:
        if _same_unrounded(wide, weight, epsilon, form) and all(
            same_bits(module(probe), norm(probe, weight, epsilon, form))
            for probe in _probes(_ROUNDED_NUMBERS // len(weight) + 1, len(weight))
        ):
            return form
    return None


@torch.no_grad()
def _same_unrounded(wide: nn.Module, weight: Tensor, epsilon: float, form: Form) -> bool:
    """In float32, where another order of additions shows; rounded to bf16 it would seldom."""
    return all(
        torch.equal(wide(probe.float()), _norm(probe, weight, epsilon, form, torch.float32))
        for probe in _probes(_UNROUNDED_ROWS, len(weight))
    )


def norm(inputs: Tensor, weight: Tensor, epsilon: float, form: int) -> Tensor:
    """inputs: [..., D], contiguous bf16; weight: [D]. Returns [..., D]."""
    return _norm(inputs, weight, epsilon, form, torch.bfloat16)


def _norm(inputs: Tensor, weight: Tensor, epsilon: float, form: int, dtype: torch.dtype) -> Tensor:
    outputs = torch.empty_like(inputs, dtype=dtype)
    columns = weight.shape[0]
    kernels = binding.kernels()
    function = kernels.rms_norm if dtype == torch.bfloat16 else kernels.rms_norm_wide
    function(
        inputs.data_ptr(),
        weight.data_ptr(),
        epsilon,
        inputs.numel() // columns,
        columns,
        form,
        outputs.data_ptr(),
    )
    return outputs


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also of zeros' signs."""
    return (
        a.dtype == b.dtype == torch.bfloat16
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))
    )


def _looks_like_a_norm(module: nn.Module) -> bool:
    """One weight over the last axis, an epsilon, and an input that stands alone."""
    parameters = dict(module.named_parameters())
    return (
        list(parameters) == ["weight"]
        and parameters["weight"].dim() == 1
        and not any(module.children())
        and any(isinstance(getattr(module, name, None), float) for name in _EPSILON_NAMES)
        and _takes_one_tensor(module)
    )


def _takes_one_tensor(module: nn.Module) -> bool:
    _, *others = inspect.signature(module.forward).parameters.values()
    return all(other.default is not inspect.Parameter.empty for other in others)


def _epsilon(module: nn.Module) -> float:
    names = [name for name in _EPSILON_NAMES if isinstance(getattr(module, name, None), float)]
    return float(getattr(module, names[0]))


def _can_take(tensor: Tensor, columns: int) -> bool:
    return (
        tensor.dtype == torch.bfloat16
        and tensor.shape[-1] == columns
        and columns % _LANES == 0
        and tensor.is_contiguous()
    )


@torch.no_grad()
def _probes(rows: int, columns: int) -> Iterator[Tensor]:
    """[rows, columns]: of usual size; of sizes far apart; so small that epsilon counts; and some of
    many more draws, as a norm rounds to few bits.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (rows, columns)
    for scale in (1.0, 1.0, 1.0, 30.0, 1e-3):
        yield torch.randn(shape, generator=generator).mul(scale).bfloat16()
    exponents = torch.randint(-20, 20, shape, generator=generator)
    yield torch.randn(shape, generator=generator).mul(torch.exp2(exponents.float())).bfloat16()


def _one_token_class(own: type[nn.Module]) -> type[nn.Module]:
    if own not in _classes:
        attributes = {"__module__": own.__module__}
        _classes[own] = type(f"OneToken{own.__name__}", (OneTokenNorm, own), attributes)
    return _classes[own]
