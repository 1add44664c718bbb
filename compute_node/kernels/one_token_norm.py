"""The RMS norms of a model: one token goes through native one_token where that gives the module's
own bits, which is found out for each module and number of rows on this machine.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator
from enum import IntEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compute_node.kernels.prober import Prober, facts_of
from compute_node.kernels.verdicts import Key, Verdict, same_bits
from compute_node.native import binding

logger = logging.getLogger(__name__)

_LANES = 16
_MAX_ROWS = 256  # heads of a token; more are a prompt's
_UNROUNDED_ROWS = 16
_ROUNDED_NUMBERS = 1 << 12
_EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon")


class Form(IntEnum):
    """What becomes of the weight; native one_token counts them from 0."""

    AFTER_ROUNDING = 1
    BEFORE_ROUNDING = 2
    ONE_PLUS = 3


class OneTokenNorm:
    """What a norm does, and its bits; the norm's own forward computes whatever this leaves to it.

    key: what verdicts are kept by, rows and threads apart
    """

    def __init__(
        self, module: nn.Module, form: Form, epsilon: float, prober: Prober, key: Key
    ) -> None:
        self._by_torch: Callable[..., Tensor] = module.forward
        self._weight: Tensor = module.weight  # type: ignore[assignment]
        self._columns = len(self._weight)
        self._form, self._epsilon, self._prober, self._key = form, epsilon, prober, key
        self._is_native: dict[int, bool] = {}  # by number of rows

    def __call__(self, inputs: Tensor, *others: Any, **options: Any) -> Tensor:
        rows = inputs.numel() // self._columns
        if rows > _MAX_ROWS or others or options or not _can_take(inputs, self._columns):
            return self._by_torch(inputs, *others, **options)
        if rows not in self._is_native:
            self._is_native[rows] = self._ask(rows)
        if not self._is_native[rows]:
            return self._by_torch(inputs)
        return norm(inputs, self._weight, self._epsilon, self._form)

    def _ask(self, rows: int) -> bool:
        key = (*self._key, rows, torch.get_num_threads())
        return bool(self._prober.norm.ask(key, lambda: Verdict(self._gives_same_bits(rows))).way)

    def _gives_same_bits(self, rows: int) -> bool:
        same = all(
            same_bits(self._by_torch(probe), norm(probe, self._weight, self._epsilon, self._form))
            for probe in _probes(rows, self._columns)
        )
        if not same:
            logger.warning("norm left to torch", extra={"width": self._columns, "rows": rows})
        return same


def adopt(model: nn.Module, prober: Prober, model_id: str = "") -> None:
    """Every module that turns out to be an RMS norm gets such a forward.

    model_id: identifies the model's configuration
    """
    for module in model.modules():
        if not _looks_like_a_norm(module):
            continue
        epsilon, width = _epsilon(module), len(module.weight)  # type: ignore[arg-type]
        key = (model_id, facts_of(module), width, str(module.weight.dtype))
        form = prober.norm.ask(key, partial(_find_form, module, epsilon)).way
        prober.num_modules["norm", form > 0] += 1
        if form:
            module.forward = OneTokenNorm(module, Form(form), epsilon, prober, key)
    native, by_torch = (prober.num_modules["norm", is_native] for is_native in (True, False))
    logger.info("norms chosen", extra={"native": native, "torch": by_torch})


@torch.no_grad()
def _find_form(module: nn.Module, epsilon: float) -> Verdict:
    """Whose bits are the module's own, whatever its weight: 1s would look the same in each."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if binding.load() is None or not _can_take(weight, len(weight)):
        return Verdict(0)
    own = copy.deepcopy(module)
    own.weight.normal_(0.5, 0.5, generator=torch.Generator().manual_seed(0))  # type: ignore[operator]
    weight, wide = own.weight.clone(), copy.deepcopy(own).float()  # type: ignore[operator]
    for form in Form:
        if _same_unrounded(wide, weight, epsilon, form) and all(
            same_bits(own(probe), norm(probe, weight, epsilon, form))
            for probe in _probes(_ROUNDED_NUMBERS // len(weight) + 1, len(weight))
        ):
            return Verdict(form)
    return Verdict(0)


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
        form - 1,
        outputs.data_ptr(),
    )
    return outputs


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
