"""What computes with each kind of record of one layer's experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from compute_node.kernels.expert_kernels import ExpertKernels
from proto.expert import EXACT_VARIANT


@dataclass(frozen=True)
class VariantKernels:
    """small: by the name of a variant"""

    exact: ExpertKernels
    small: Mapping[str, ExpertKernels] = field(default_factory=dict)

    def of(self, variant: str) -> ExpertKernels:
        return self.exact if variant == EXACT_VARIANT else self.small[variant]
