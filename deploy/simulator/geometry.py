"""What of a model decides how fast boxes decode it: how many experts, how large, and what is read
beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from deploy.plan.owners_map import Model
from expert_store.manifest.share import Share
from proto.expert import ModelSpec
from proto.held_experts import ALL_EXPERTS, HeldExperts

BF16, FP8, INT4, MXFP4 = 16.0, 8.0, 4.5, 4.25  # bits a weight, scales included


@dataclass(frozen=True)
class Geometry:
    """expert_bytes: of one routed expert

    num_layers:  with routed experts; num_experts: of each; top_k: of them a token
    dense_bytes: that a token multiplies beside routed experts, all on the main node: attention,
                 routers, shared experts, dense layers, the output matrix
    hidden_size: activations of a token, two bytes each on the wire
    """

    name: str
    num_layers: int
    num_experts: int
    top_k: int
    expert_bytes: float
    dense_bytes: float
    hidden_size: int

    @property
    def num_experts_total(self) -> int:
        return self.num_layers * self.num_experts

    @property
    def experts_bytes(self) -> float:
        return self.num_experts_total * self.expert_bytes

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_layers, self.num_experts

    @property
    def model(self) -> Model:
        return Model(range(self.num_layers), self.num_experts, self.expert_bytes)

    def held(self, share: Share | None) -> HeldExperts:
        """By a store with this share. Raises ManifestInvalid for more shares than a layer has
        experts.
        """
        if share is None:
            return ALL_EXPERTS
        layers = tuple(range(self.num_layers))
        spec = ModelSpec("", self.name, layers, self.num_experts, self.top_k, {})
        return HeldExperts(share.experts(spec))


def _gpt_oss_20b() -> Geometry:
    hidden, layers, experts = 2880, 24, 32
    heads, kv_heads = 64 * 64, 8 * 64
    attention = hidden * (2 * heads + 2 * kv_heads)
    dense = layers * (attention + hidden * experts) + 201_088 * hidden
    expert = 3 * hidden * 2880
    return Geometry("gpt-oss-20b", layers, experts, 4, expert * MXFP4 / 8, dense * BF16 / 8, hidden)


def _qwen3_30b_a3b(name: str, bits: float) -> Geometry:
    hidden, layers, experts = 2048, 48, 128
    attention = hidden * (2 * 32 * 128 + 2 * 4 * 128)
    dense = layers * (attention + hidden * experts) + 151_936 * hidden
    return Geometry(name, layers, experts, 8, 3 * hidden * 768 * bits / 8, dense * BF16 / 8, hidden)


def _deepseek_v3() -> Geometry:
    hidden, layers, moe_layers, experts = 7168, 61, 58, 256
    queries = hidden * 1536 + 1536 * 128 * 192
    keys = hidden * (512 + 64) + 512 * 128 * 256
    attention = queries + keys + 128 * 128 * hidden
    expert = 3 * hidden * 2048
    dense_layers = (layers - moe_layers) * 3 * hidden * 18_432
    in_fp8 = layers * attention + dense_layers + moe_layers * expert  # one shared expert a layer
    in_bf16 = moe_layers * hidden * experts + 129_280 * hidden
    return Geometry(
        "DeepSeek-V3",
        moe_layers,
        experts,
        8,
        expert * FP8 / 8,
        in_fp8 * FP8 / 8 + in_bf16 * BF16 / 8,
        hidden,
    )


GEOMETRIES = {
    one.name: one
    for one in (
        _gpt_oss_20b(),
        _qwen3_30b_a3b("Qwen3-30B-A3B", BF16),
        _qwen3_30b_a3b("Qwen3-30B-A3B-int4", INT4),
        _deepseek_v3(),
    )
}
