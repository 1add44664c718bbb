"""What `index`, `pack` and `shard` wrote, in one line on stdout."""

from __future__ import annotations

from pathlib import Path

from deploy.terminal import console
from expert_store.manifest.manifest import Manifest


def print_written(manifest: Manifest, out: Path) -> None:
    spec = manifest.spec
    formats = [str(variant.weight_format) for variant in spec.variants.values()]
    share = ""
    if manifest.share is not None:
        share = f"{manifest.share}, {manifest.num_experts} of {spec.num_experts_total} experts, "
    beside = f", and {', '.join(formats)} beside them" if formats else ""
    console.out.print(
        f"{out}: {spec.model_type}, {len(spec.moe_layers)} MoE layers x {spec.num_experts} "
        f"experts, {share}"
        f"{console.size(manifest.expert_bytes_total)} of experts, "
        f"{console.size(manifest.sizing.dense_bytes)} dense, weights {spec.weight_format}{beside}"
    )
