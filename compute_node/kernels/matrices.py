"""The matrices of an experts module: which there are, which way round, and whether a store's
records hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from proto import errors
from proto.expert import ModelSpec, TensorLayout

# Name, dtype and shape of a tensor in a record.
Described = tuple[str, str, tuple[int, ...]]


def shape_of(module: Any, name: str) -> tuple[int, int]:
    """Outputs and inputs, [N, K], of an expert's matrix, whatever way round the module has it."""
    first, second = getattr(module, name).shape[1:]
    return (second, first) if module.is_transposed else (first, second)


def names_of(module: Any) -> list[str]:
    """Of an expert's matrices, not its biases."""
    return [name for name, tensor in module.named_parameters(recurse=False) if tensor.dim() == 3]


def check_records(
    spec: ModelSpec,
    modules: Mapping[int, Any],
    expected: Callable[[Any, Mapping[str, TensorLayout]], Iterable[Described]],
) -> None:
    """That a store's records have what kernels of its format take.

    modules:  model layer number -> experts module
    expected: of a module, and of what its records hold by name: what they must hold

    Raises ManifestInvalid naming what is missing.
    """
    for layer, module in modules.items():
        stored = {tensor.name: tensor for tensor in spec.layouts[layer]}
        held = {(tensor.name, tensor.dtype, tensor.shape) for tensor in stored.values()}
        missing = sorted({name for name, *_ in set(expected(module, stored)) - held})
        if missing:
            raise errors.ManifestInvalid(
                f"layer {layer}: {missing} are not as {spec.weight_format} has them: pack the "
                "checkpoint again"
            )
