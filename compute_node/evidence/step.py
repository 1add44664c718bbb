"""What a forward pass asked of the experts, as entries for the access log."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from compute_node.evidence.accesses import layers_of, recorded
from compute_node.evidence.log import AccessLog
from compute_node.moe.step import LayerAccess, Part, Phase, Step
from proto.access import DecodeAccess, PrefillAccess
from proto.expert import ModelSpec


class Evidence:
    """Makes entries of steps. policy: names the policy in charge."""

    def __init__(
        self,
        log: AccessLog,
        spec: ModelSpec,
        node: str,
        slots: int,
        scope: str,
        policy: Callable[[], str],
    ) -> None:
        self._log = log
        self._spec = spec
        self._node = node
        self._slots = slots
        self._scope = scope
        self._policy = policy

    def append(self, step: Step) -> None:
        """An entry for each sequence of the batch."""
        for alone in step.alone():
            [part] = alone.batch.parts
            entry = self._decode if part.phase is Phase.DECODE else self._prefill
            entry(part, alone)

    def _decode(self, part: Part, step: Step) -> None:
        access = recorded(self._spec, step, router_scores=False)
        self._log.append(
            DecodeAccess(
                node=self._node,
                sequence=part.sequence,
                step=part.num_computed,
                num_experts=self._spec.num_experts,
                slots=self._slots,
                scope=self._scope,
                policy=self._policy(),
                time_ns=time.time_ns(),
                topk_ids=access.topk_ids,
                topk_weights=access.topk_weights,
                hits=_hits(access.topk_ids, layers_of(self._spec, step.accesses)),
                gates=_gates(self._spec, step),
            )
        )

    def _prefill(self, part: Part, step: Step) -> None:
        counts = [
            torch.bincount(access.ids.flatten(), minlength=self._spec.num_experts)
            for access in layers_of(self._spec, step.accesses)
        ]
        self._log.append(
            PrefillAccess(
                node=self._node,
                sequence=part.sequence,
                num_tokens=part.num_rows,
                time_ns=time.time_ns(),
                token_counts=torch.stack(counts).numpy().astype(np.uint32),
            )
        )


def _gates(spec: ModelSpec, step: Step) -> NDArray[np.float16] | None:
    """[L, E] of one sequence's token; None where nothing goes by them."""
    if step.gates is None:
        return None
    gates: NDArray[np.float16] = torch.cat([step.gates[layer] for layer in spec.moe_layers]).numpy()
    return gates


def _hits(ids: NDArray[np.uint16], layers: list[LayerAccess]) -> NDArray[np.bool_]:
    rows = [
        [expert in access.hits for expert in row] for row, access in zip(ids, layers, strict=True)
    ]
    return np.array(rows, dtype=bool)
