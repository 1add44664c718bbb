"""Tiny random checkpoints of every architecture we promise, made with transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_QWEN = {
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 1,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 16, "num_experts_per_tok": 2},
    "olmoe": {"intermediate_size": 48, "num_experts": 16, "num_experts_per_tok": 4},
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**_QWEN, "head_dim": 16},
    "qwen3_next": {
        **_QWEN,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "deepseek_v2": {**_DEEPSEEK, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": {**_DEEPSEEK, "n_group": 2, "topk_group": 1},
    "glm4_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 32,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
        "head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
    },
    "phimoe": {"intermediate_size": 48, "num_local_experts": 16, "num_experts_per_tok": 2},
    "granitemoe": {"intermediate_size": 48, "num_local_experts": 16, "num_experts_per_tok": 4},
    "gpt_oss": {
        "intermediate_size": 48,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "jamba": {
        "num_hidden_layers": 4,
        "intermediate_size": 48,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
}


def make(
    architecture: str,
    root: Path,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """A checkpoint whose weights are large enough that routing and tokens vary."""
    config = AutoConfig.for_model(
        architecture, **{**_BASE, **ARCHITECTURES[architecture], **overrides}
    )
    return save(config, root, dtype, seed, max_shard_size=max_shard_size)


def save(
    config: Any, root: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **how: Any
) -> Path:
    """The same of any configuration. how: as `save_pretrained` takes it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif "bias" in name:
                parameter.normal_(0, 0.05)
    model.save_pretrained(root, **how)
    return root
