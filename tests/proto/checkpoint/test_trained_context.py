"""How long a context a configuration is trained for, as published models state it.

Planted faults seen red: a factor applied to lengths that are scaled already (llama3, longrope), the
original left out, one kind of layers looked at.
"""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from proto.checkpoint.trained_context import trained_context_tokens

ROPE = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", **ROPE}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "short_mscale": 1.0,
    "long_mscale": 1.0,
    **ROPE,
}
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("architecture", "configured", "rope", "expected"),
    [
        ("mixtral", 32768, {"rope_type": "default", **ROPE}, 32768),
        ("qwen3_moe", 4096, {"rope_type": "linear", "factor": 4.0, **ROPE}, 16384),
        ("qwen3_moe", 4096, {"rope_type": "dynamic", "factor": 2.0, **ROPE}, 8192),
        ("qwen3_moe", 32768, {**YARN, "factor": 4.0}, 131072),
        (
            "deepseek_v3",
            163840,
            {**YARN, "factor": 40, "original_max_position_embeddings": 4096},
            163840,
        ),
        (
            "gpt_oss",
            131072,
            {**YARN, "factor": 32.0, "original_max_position_embeddings": 4096},
            131072,
        ),
        (
            "mixtral",
            131072,
            {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192},
            131072,
        ),
        ("phimoe", 131072, {**LONG, "original_max_position_embeddings": 4096}, 131072),
        ("granitemoe", 2048, None, 2048),
    ],
)
def test_length_by_rope_scaling(
    architecture: str, configured: int, rope: dict[str, Any] | None, expected: int
) -> None:
    config = AutoConfig.for_model(
        architecture,
        **SMALL,
        max_position_embeddings=configured,
        **({"rope_parameters": rope} if rope else {}),
    )
    assert trained_context_tokens(config) == expected


def test_the_shortest_of_layers_that_scale_otherwise() -> None:
    config = AutoConfig.for_model("qwen3_moe", **SMALL, max_position_embeddings=4096)
    config.rope_parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_type": "default"},
    }
    assert trained_context_tokens(config) == 4096


def test_a_text_model_inside_another_is_looked_at() -> None:
    config = AutoConfig.for_model("qwen3_vl_moe")
    config.text_config.max_position_embeddings = 777
    assert trained_context_tokens(config) == 777


def test_without_positions_there_is_no_limit() -> None:
    assert trained_context_tokens(AutoConfig.for_model("mamba")) is None
