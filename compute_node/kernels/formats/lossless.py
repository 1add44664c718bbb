"""Products with bf16 matrices kept in twelve bits a number, bit for bit those with the matrices
themselves: by native kernels as they lie, or unpacked for torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import inf, prod

import torch
from torch import Tensor
from torch.nn import functional

from compute_node.kernels import gemm, gemv, scratch
from compute_node.kernels.formats.matrix import Described, MatrixSpec, Steps
from compute_node.kernels.prober import Prober
from compute_node.kernels.verdicts import Verdict, same_bits
from compute_node.native import binding
from proto.expert import TensorLayout
from proto.weight_format import (
    BASES,
    CODES,
    OUTLIER_ENDS,
    OUTLIERS,
    WeightFormat,
    lossless_tensors,
)

_PARTS = ("", CODES, BASES, OUTLIER_ENDS, OUTLIERS)  # as native lossless has them
_PLACE_BITS = 24


class LosslessMatrix:
    """A Matrix [N, K] in twelve bits a number, whatever way round the checkpoint has it."""

    def __init__(self, spec: MatrixSpec, prober: Prober) -> None:
        self._spec = spec
        is_bf16 = spec.model == torch.bfloat16
        is_native = is_bf16 and not spec.is_transposed and binding.load() is not None
        self.native = NativeLossless(spec, prober) if is_native else None

    @classmethod
    def expected(
        cls, weight_format: WeightFormat, matrix: MatrixSpec, stored: Mapping[str, TensorLayout]
    ) -> Iterator[Described]:
        """Any number of outliers will do."""
        outliers = stored.get(matrix.name + OUTLIERS)
        num_outliers = prod(outliers.shape) if outliers else 1
        for suffix, dtype, shape in lossless_tensors(*matrix.shape, num_outliers):
            yield matrix.name + suffix, dtype, shape

    def linear(self, tensors: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        spec, bias = self._spec, self._spec.bias(tensors)
        if self.native is not None and gemm.can_take(inputs):
            step = self.native.step_of(tensors, inputs.shape[0])
            if step:
                return self.native.multiply_tokens(tensors, inputs, bias, step)
        weight = unpack(tensors, spec.name, spec.shape)
        if not spec.is_transposed:
            return functional.linear(inputs, weight, bias)
        output = inputs @ weight.T.contiguous()
        return output if bias is None else output + bias


class NativeLossless:
    """The same for native entries, which multiply with it as it lies."""

    is_lossless = True

    def __init__(self, spec: MatrixSpec, prober: Prober) -> None:
        self._spec, self._prober = spec, prober
        self._parts = [spec.name + part for part in _PARTS]
        self._of_one: dict[int, Verdict] = {}  # by threads
        self._steps = Steps(spec, prober)

    def arrays(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [tensors[part] for part in self._parts]

    def of_one_token(self, tensors: Mapping[str, Tensor]) -> Verdict:
        threads = torch.get_num_threads()
        if threads not in self._of_one:
            key = (self._spec.shape, self._spec.has_bias, threads)
            prove = partial(self._prove_one_token, tensors)
            self._of_one[threads] = self._prober.lossless_gemv.ask(key, prove)
        return self._of_one[threads]

    def multiply(self, experts: Sequence[Mapping[str, Tensor]], inputs: Tensor) -> Tensor:
        num_outputs, num_inputs = self._spec.shape
        biases = self._spec.biases(experts)
        outputs = torch.empty((len(experts), num_outputs), dtype=torch.bfloat16)
        binding.kernels().lossless_gemv(
            gemv.addresses([array for tensors in experts for array in self.arrays(tensors)]),
            gemv.addresses(biases) if biases else None,
            len(experts),
            inputs.data_ptr(),
            num_inputs if inputs.shape[0] > 1 else 0,
            outputs.data_ptr(),
            num_outputs,
            num_inputs,
            gemv.parallel(),
            torch.get_num_threads(),
        )
        return outputs

    def multiply_tokens(
        self, tensors: Mapping[str, Tensor], inputs: Tensor, bias: Tensor | None, step: int
    ) -> Tensor:
        """One expert's product. inputs: [t, K]; step: from `step_of`. Returns [t, N]."""
        arrays, num_outputs = self.arrays(tensors), self._spec.shape[0]
        return gemm.multiply_arrays(inputs, arrays, True, num_outputs, bias, step)

    def step_of(self, tensors: Mapping[str, Tensor], num_tokens: int) -> int:
        return self._steps.of(tensors, num_tokens, partial(self._ask, tensors, num_tokens))

    def _ask(self, tensors: Mapping[str, Tensor], num_tokens: int) -> Verdict:
        key = (num_tokens, self._spec.shape, self._spec.has_bias, torch.get_num_threads())
        return self._prober.lossless_gemm.ask(key, partial(self._prove_step, tensors, num_tokens))

    @torch.no_grad()
    def _prove_one_token(self, tensors: Mapping[str, Tensor]) -> Verdict:
        """Where gemv has torch's bits, and this has gemv's."""
        weight, bias = self._unpack(tensors).clone(), self._spec.bias(tensors)
        if not gemv.verdict_of(self._prober, weight, bias).way:
            return Verdict(0)
        inputs = _drawn(1, self._spec.shape[1])
        expected = gemv.multiply([weight], inputs, [] if bias is None else [bias])
        if not same_bits(self.multiply([tensors], inputs), expected):
            return Verdict(0)
        ratio = self._prober.ratio(
            lambda: self.multiply([tensors], inputs),
            lambda: functional.linear(inputs, self._unpack(tensors), bias),
        )
        return Verdict(1, ratio)

    @torch.no_grad()
    def _prove_step(self, tensors: Mapping[str, Tensor], num_tokens: int) -> Verdict:
        """Where gemm has torch's bits, and has them of the packed matrix, too."""
        weight, bias = self._unpack(tensors), self._spec.bias(tensors)
        # torch would have to unpack it first: so no product is too large to try, and where the
        # matrix itself takes no longer than torch's, this takes less.
        step = gemm.verdict_of(self._prober, num_tokens, weight, bias, max_work=inf).chosen
        if not step:
            return Verdict(0)
        inputs = _drawn(num_tokens, self._spec.shape[1])
        expected = gemm.multiply(inputs, weight, bias, step)
        found = self.multiply_tokens(tensors, inputs, bias, step)
        return Verdict(step if same_bits(found, expected) else 0)

    def _unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return unpack(tensors, self._spec.name, self._spec.shape)


def _drawn(num_tokens: int, num_inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((num_tokens, num_inputs), generator=generator).bfloat16()


def unpack(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    """Matrix `name` as [N, K] bf16; valid until the next on this thread."""
    if binding.load() is None:
        return unpack_by_torch(tensors, name, shape)
    weight = scratch.empty(shape, torch.bfloat16)
    binding.kernels().lossless_unpack(
        gemv.addresses([tensors[name + part] for part in _PARTS]),
        weight.data_ptr(),
        *shape,
        gemv.parallel(),
        torch.get_num_threads(),
    )
    return weight


def unpack_by_torch(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    """The same on any CPU, in more time and memory."""
    signs, codes = tensors[name], tensors[name + CODES]  # [N, K], [N, K / 2]
    blocks, tiles = signs.shape[0] // 16, signs.shape[1] // 32
    numbers = signs.view(-1, 64).short()  # in the order of the record
    code = torch.stack([codes & 15, codes >> 4], dim=-1).view(numbers.shape)
    bases = tensors[name + BASES].view(blocks, 1, 4, 1, 4, 1)
    bases = bases.expand(-1, tiles * 8, -1, 2, -1, 2).reshape(numbers.shape)
    exponents = torch.where(code == 0, 0, code + bases).view(blocks, -1)  # [blocks, 16 * K]
    ends, outliers = tensors[name + OUTLIER_ENDS], tensors[name + OUTLIERS].long() & 0xFFFFFFFF
    outliers = outliers[: int(ends[-1])]
    block = torch.bucketize(torch.arange(len(outliers)), ends, right=True)
    exponents[block, outliers & (1 << _PLACE_BITS) - 1] = (outliers >> _PLACE_BITS).to(torch.uint8)
    bits = (numbers & 0x80) << 8 | exponents.view(numbers.shape).short() << 7 | numbers & 0x7F
    rows = bits.view(blocks, tiles, 8, 4, 2, 4, 2).permute(0, 3, 5, 1, 2, 4, 6)
    return rows.reshape(signs.shape)[: shape[0], : shape[1]].contiguous().view(torch.bfloat16)
