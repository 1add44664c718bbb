"""Expected decode speed of a plan: what must be read and what must be multiplied, with its
uncertainty.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from deploy.plan.budget import MemoryPlan
from deploy.plan.disk import RecordSpeed
from deploy.plan.rotation import Rotation
from expert_store.manifest.manifest import Manifest

# Between uniform routing, where a cache hits as often as it is large, and the gap that decayed
# frequency closed
# towards certainty on real traces (gpt-oss-20b and the shipped model, see tests/bench/LOG.md).
_LOCALITY = 0.75
_CALL_S = 40e-6  # of an operation that torch is asked for
_RPC_S = 0.0006  # one round trip a layer that misses


@dataclass(frozen=True)
class Estimate:
    """tokens/s: low with uniform routing and the slow decile of reads, high with real locality
    and the fast one.
    """

    low_tokens_per_s: float
    likely_tokens_per_s: float
    high_tokens_per_s: float
    likely_hit_ratio: float
    bytes_per_token: float


def estimate(manifest: Manifest, plan: MemoryPlan, records: RecordSpeed) -> Estimate:
    spec = manifest.spec
    share = plan.slots / plan.num_experts
    local = share + (1 - share) * _LOCALITY
    accesses = spec.top_k * len(spec.moe_layers)
    expert_bytes = _expert_bytes(manifest)
    bandwidth = measure_memory()
    touched = manifest.sizing.activated_dense_bytes + accesses * expert_bytes
    compute_s = touched / bandwidth + _CALL_S * 25 * len(spec.moe_layers)

    def tokens_per_s(hit_ratio: float, slowdown: float) -> float:
        misses = accesses * (1 - hit_ratio)
        layers = min(len(spec.moe_layers), misses)
        return 1 / (compute_s + misses / records.records_per_s * slowdown + layers * _RPC_S)

    return Estimate(
        low_tokens_per_s=tokens_per_s(share, records.p90_s / records.median_s),
        likely_tokens_per_s=tokens_per_s((share + local) / 2, 1.0),
        high_tokens_per_s=tokens_per_s(local, records.p10_s / records.median_s),
        likely_hit_ratio=(share + local) / 2,
        bytes_per_token=accesses * (1 - (share + local) / 2) * expert_bytes,
    )


def rotation(manifest: Manifest, plan: MemoryPlan, records: RecordSpeed, link_s: float) -> Rotation:
    """Of workers that each have a disk and a processor like this machine's and as much memory for
    experts as planned, with an int4 shadow. link_s: a layer's work there and back
    """
    spec = manifest.spec
    num_layers, expert_bytes = len(spec.moe_layers), _expert_bytes(manifest)
    bandwidth = measure_memory()
    dense_s = manifest.sizing.activated_dense_bytes / bandwidth / num_layers + 25 * _CALL_S
    small_s = spec.top_k * expert_bytes / 4 / bandwidth
    return Rotation(
        num_layers,
        spec.top_k,
        expert_bytes,
        records.bytes_per_s,
        dense_s,
        expert_bytes / bandwidth,
        link_s,
        dense_s + small_s,
        0.0,
        max(1, plan.slots),
    )


def _expert_bytes(manifest: Manifest) -> float:
    return fmean(record.payload_bytes for record in manifest.exact_records)


def measure_memory() -> float:
    """Bytes a second that a sum over memory reads, best of three."""
    data = np.ones(32 * 1024 * 1024, dtype=np.float32)
    times = []
    for _ in range(3):
        start_s = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start_s)
    return float(data.nbytes / min(times))
