"""What computes one token, our kernels or torch, by what it is."""

from __future__ import annotations

from dataclasses import dataclass

from compute_node.kernels.prober import Prober
from proto.stats import gauge


@dataclass(frozen=True)
class KernelCounts:
    """Of what one side computes, as a label says."""

    matrix_shapes: int = gauge(
        "flashmoe_node_matrix_shapes", "Shapes of matrices by what multiplies one token with them"
    )
    norms: int = gauge("flashmoe_node_norms", "Norms by what computes one token's")
    experts_modules: int = gauge(
        "flashmoe_node_experts_modules", "Experts modules by what computes one token's gate"
    )

    @classmethod
    def of(cls, prober: Prober, native: bool) -> KernelCounts:
        modules = prober.num_modules
        return cls(prober.gemv.count(native), modules["norm", native], modules["gate", native])
