"""Which checkpoint tensors make up which parameter, by transformers' own conversion table.

Three shapes of an expert parameter can be read in place: stored fused, one tensor an expert, or one
tensor an expert for each of several parts laid one after another (gate and up). A fourth, mxfp4
blocks and scales, has to be packed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from expert_store.offline.checkpoint.files import CheckpointTensor
from proto import errors

EXPERT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPES = {dtype: name for name, dtype in EXPERT_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Part:
    """A byte range of one checkpoint tensor: all of it, or one expert's slice of a fused one."""

    tensor: CheckpointTensor
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True)
class ExpertParameter:
    """One parameter of an experts module.

    parts[e]:      what makes up expert e's slice, in order; of mxfp4 its blocks, then its scales
    is_transposed: whether the module has its matrices as [inputs, outputs]
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Part, ...], ...]
    is_transposed: bool = False
    encoding: Literal["plain", "mxfp4"] = "plain"

    @property
    def is_matrix(self) -> bool:
        """Not a bias."""
        return len(self.shape) == 2

    @property
    def outputs_and_inputs(self) -> tuple[int, int]:
        """Of a matrix, whatever way round the module has it."""
        first, second = self.shape
        return (second, first) if self.is_transposed else (first, second)


class ParameterSources:
    """Which checkpoint tensors make up which parameter, by transformers' conversion table."""

    def __init__(self, model: Any, tensors: Mapping[str, CheckpointTensor]) -> None:
        mapping = get_model_conversion_mapping(model)
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._model = model
        self._state = state = model.state_dict()
        prefix = model.base_model_prefix
        self._by_target: dict[str, list[tuple[CheckpointTensor, str | None]]] = {}
        for name, tensor in tensors.items():
            target, pattern = rename_source_key(name, renamings, self._converters, prefix, state)
            if target not in state and name in state:
                target, pattern = rename_source_key(name, [], [], prefix, state)
            self._by_target.setdefault(target, []).append((tensor, pattern))
        self._taken: set[str] = set()

    def expert_parameter(
        self, target: str, name: str, parameter: Any, is_transposed: bool
    ) -> ExpertParameter:
        if parameter.dtype not in _DTYPES:
            raise errors.CheckpointUnsupported(
                f"its config makes {target} {parameter.dtype}: experts may be float32, bfloat16 or "
                "float16"
            )
        dtype, shape = _DTYPES[parameter.dtype], tuple(parameter.shape[1:])
        if f"{target}_blocks" in self._by_target:
            parts = self._mxfp4(target, parameter)
            return ExpertParameter(name, dtype, shape, parts, is_transposed, "mxfp4")
        found = self._take(target)
        if found[0][1] is None:
            parts = _slice_fused(found[0][0], tuple(parameter.shape), target)
        else:
            parts = self._gather(found, parameter.shape[0], target)
        self._check(target, parts, parameter)
        return ExpertParameter(name, dtype, shape, parts, is_transposed)

    def _take(self, target: str) -> list[tuple[CheckpointTensor, str | None]]:
        found = self._by_target.get(target)
        if not found:
            raise errors.CheckpointUnsupported(f"the checkpoint has no tensor for {target}")
        self._taken.add(target)
        return found

    def _mxfp4(self, target: str, parameter: Any) -> tuple[tuple[Part, ...], ...]:
        """Blocks [E, N, K / 32, 16] and scales [E, N, K / 32] of a transposed parameter
        [E, K, N].
        """
        self._taken.add(target)
        num_experts, num_inputs, num_outputs = parameter.shape
        prefix = (num_experts, num_outputs, num_inputs // 32)
        blocks = self._take_bytes(f"{target}_blocks", (*prefix, 16))
        scales = self._take_bytes(f"{target}_scales", prefix)
        return tuple((*b, *s) for b, s in zip(blocks, scales, strict=True))

    def _take_bytes(self, target: str, shape: tuple[int, ...]) -> tuple[tuple[Part, ...], ...]:
        tensor = self._take(target)[0][0]
        if tensor.dtype != "U8":
            raise errors.CheckpointUnsupported(f"{tensor.name} is {tensor.dtype}, mxfp4 has U8")
        return _slice_fused(tensor, shape, target)

    def dense(self) -> tuple[CheckpointTensor, ...]:
        """What the model takes besides what was taken as experts; call it after that.

        Raises CheckpointUnsupported when the model wants what the checkpoint has not, or in another
        shape.
        """
        self._check_complete()
        targets = [t for t in self._by_target if t in self._state and t not in self._taken]
        for target in targets:
            for tensor, pattern in self._by_target[target]:
                if pattern is None and tensor.shape != tuple(self._state[target].shape):
                    raise errors.CheckpointUnsupported(
                        f"{tensor.name} has shape {tensor.shape} on disk, its config makes it "
                        f"{tuple(self._state[target].shape)}: config and weights do not belong "
                        "together"
                    )
        return tuple(tensor for target in targets for tensor, _ in self._by_target[target])

    def skipped(self) -> tuple[CheckpointTensor, ...]:
        """What the model does not take: layers for training, other heads, other modalities."""
        return tuple(
            tensor
            for target, found in self._by_target.items()
            if target not in self._state and target not in self._taken
            for tensor, _ in found
        )

    def _check_complete(self) -> None:
        filled = set(self._taken)
        for target, found in self._by_target.items():
            filled.update(self._targets_beside(target, found[0][1]))
        ignored = self._model._keys_to_ignore_on_load_missing or ()
        missing = [
            name
            for name in self._state
            if name not in filled
            and name not in self._model.all_tied_weights_keys
            and not any(re.search(pattern, name) for pattern in ignored)
        ]
        if missing:
            others = f", nor for {len(missing) - 1} others that" if missing[1:] else ", which"
            raise errors.CheckpointUnsupported(
                f"the checkpoint has no tensor for {missing[0]}{others} the model needs: download "
                "it again, or check config.json"
            )

    def _targets_beside(self, target: str, pattern: str | None) -> list[str]:
        """What a conversion by `pattern` fills, `target` being its first."""
        if pattern is None:
            return [target]
        converter = next(c for c in self._converters if pattern in c.source_patterns)
        first, *others = converter.target_patterns
        return [target, *(target.replace(first, other) for other in others)]

    def _gather(
        self, found: list[tuple[CheckpointTensor, str | None]], num_experts: int, target: str
    ) -> tuple[tuple[Part, ...], ...]:
        """One tensor an expert and pattern; patterns follow one another inside an expert."""
        converter = next(c for c in self._converters if found[0][1] in c.source_patterns)
        _check_operations(converter, target)
        by_pattern: dict[str, list[CheckpointTensor]] = {p: [] for p in converter.source_patterns}
        for tensor, pattern in found:
            by_pattern[str(pattern)].append(tensor)
        for pattern, tensors in by_pattern.items():
            if len(tensors) != num_experts:
                raise errors.CheckpointUnsupported(
                    f"{target} needs {num_experts} tensors like {pattern}, the checkpoint has "
                    f"{len(tensors)}"
                )
            tensors.sort(key=lambda tensor: _natural(tensor.name))
        return tuple(
            tuple(
                Part(tensors[e], tensors[e].offset_bytes, tensors[e].length_bytes)
                for tensors in by_pattern.values()
            )
            for e in range(num_experts)
        )

    def _check(self, target: str, parts: tuple[tuple[Part, ...], ...], parameter: Any) -> None:
        want_bytes = parameter[0].numel() * parameter.element_size()
        for expert, expert_parts in enumerate(parts):
            for part in expert_parts:
                if part.tensor.dtype != _DTYPES.get(parameter.dtype):
                    raise errors.CheckpointUnsupported(
                        f"{part.tensor.name} is {part.tensor.dtype} on disk, but the config's "
                        "dtype is "
                        f"{parameter.dtype}: save the checkpoint again in one dtype"
                    )
            if sum(part.length_bytes for part in expert_parts) != want_bytes:
                raise errors.CheckpointUnsupported(
                    f"expert {expert} of {target} has the wrong size on disk"
                )


def _check_operations(converter: Any, target: str) -> None:
    kinds = [type(operation) for operation in converter.operations]
    stacked = kinds and kinds[0] is MergeModulelist and converter.operations[0].dim == 0
    joined = kinds[1:] == [] or (kinds[1:] == [Concatenate] and converter.operations[1].dim == 1)
    if not (stacked and joined):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise errors.CheckpointUnsupported(
            f"{target} needs a conversion that cannot be read in place ({names}): save the "
            "checkpoint again with transformers' save_pretrained(DIR, save_original_format=False)"
        )


def _slice_fused(
    tensor: CheckpointTensor, shape: tuple[int, ...], target: str
) -> tuple[tuple[Part, ...], ...]:
    """shape: [E, ...]"""
    if tensor.shape != shape:
        raise errors.CheckpointUnsupported(f"{target} has shape {shape}, on disk {tensor.shape}")
    stride = tensor.length_bytes // shape[0]
    return tuple((Part(tensor, tensor.offset_bytes + e * stride, stride),) for e in range(shape[0]))


def _natural(name: str) -> list[Any]:
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]
