"""What a forward pass asked of the experts, as entries for the access log."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from compute_node.evidence.accesses import latest_step, layers_of
from compute_node.evidence.log import AccessLog
from compute_node.moe.layer import LayerAccess, StepRecord
from proto.expert import ModelSpec
from proto.redis_schema import DecodeAccess, PrefillAccess


class Evidence:
    """Packs step records. policy: names the policy in charge."""

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

    def decode(self, sequence: str, step: int, record: StepRecord) -> None:
        access = latest_step(self._spec, record)
        self._log.append(
            DecodeAccess(
                node=self._node,
                sequence=sequence,
                step=step,
                num_experts=self._spec.num_experts,
                slots=self._slots,
                scope=self._scope,
                policy=self._policy(),
                time_ns=time.time_ns(),
                topk_ids=access.topk_ids,
                topk_weights=access.topk_weights,
                hits=_hits(access.topk_ids, layers_of(self._spec, record)),
            )
        )

    def prefill(self, sequence: str, num_tokens: int, record: StepRecord) -> None:
        counts = [
            torch.bincount(access.ids.flatten(), minlength=self._spec.num_experts)
            for access in layers_of(self._spec, record)
        ]
        self._log.append(
            PrefillAccess(
                node=self._node,
                sequence=sequence,
                num_tokens=num_tokens,
                time_ns=time.time_ns(),
                token_counts=torch.stack(counts).numpy().astype(np.uint32),
            )
        )


def _hits(ids: NDArray[np.uint16], layers: list[LayerAccess]) -> NDArray[np.bool_]:
    rows = [
        [expert in access.hits for expert in row] for row, access in zip(ids, layers, strict=True)
    ]
    return np.array(rows, dtype=bool)
