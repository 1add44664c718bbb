"""Every causal architecture of the installed transformers whose experts are on its experts
interface, and a tiny configuration of each. The list is computed from transformers' own tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NUM_LAYERS = 4
_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "unpadded_vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 1,
    "split_ngram_parts": 2,
    "heads_per_ngram": 2,
    "hidden_size": 64,
    "hidden_size_per_layer_input": 8,
    "ple_embed_dim": 16,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_key_value_heads": 2,
    "head_dim": 16,
    "swa_head_dim": 16,
    "global_head_dim": 16,
    "max_position_embeddings": 256,
    "model_max_length": 256,
    "intermediate_size": 48,
    "dense_intermediate_size": 48,
    "moe_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "num_experts": 16,
    "num_local_experts": 16,
    "n_routed_experts": 16,
    "moe_num_experts": 16,
    "num_experts_per_tok": 4,
    "num_experts_per_token": 4,
    "top_k_experts": 4,
    "moe_topk": 4,
    "moe_k": 4,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "o_lora_rank": 16,
    "o_groups": 2,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    "index_block_size": 8,
    "index_topk_blocks": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_end_index": NUM_LAYERS - 1,
    "num_nextn_predict_layers": 0,
    "num_kv_shared_layers": 0,
    "sliding_window": 16,
    "sliding_window_size": 16,
    "rotary_dim": 16,
    "rel_extent": 64,
    "d_rel": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "layer_group_size": 2,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_chunk_size": 8,
    "n_groups": 1,
    "chunk_size": 8,
    "block_size": 8,
    "ssm_state_size": 8,
    "router_hidden_size": 24,
    "gated_norm_rank": 4,
    "hc_lowrank": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "eod_token_id": 2,
    "sep_token_id": 3,
}
_LAYER_LISTS = ("layer_types", "mlp_layer_types", "indexer_types", "layers_block_type")
# What the sizes above do not settle.
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_GEMMA4 = {
    "enable_moe_block": True,
    "num_experts": 16,
    "top_k_experts": 4,
    "moe_intermediate_size": 32,
}
_QWEN4 = {"indexer_n_heads": 2, "indexer_head_dim": 16, "indexer_budget": 16} | {
    "indexer_kv_heads": 1,
    "indexer_compress_ratio": 4,
}
_DOTS3 = {"swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_head_dim": 32} | {
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_qk_nope_head_dim": 24,
    "swa_v_head_dim": 16,
}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 4},
    "dots3_note": _DOTS3
    | {"vision_config": {"adapter_out_dim": 64}, "audio_config": {"adapter_out_dim": 64}},
    "dots3_note_text": _DOTS3,
    "dots1": {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 1},
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "qwen4_exp": _QWEN4,
    "qwen4_exp_text": _QWEN4,
    "zaya": {"num_experts_per_tok": 1},
}


def causal_types() -> list[str]:
    """Model types that AutoModelForCausalLM builds from a file with experts on the interface."""
    models = Path(transformers.__file__).parent / "models"
    found = []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        module = model_type_to_module_name(model_type)
        source = models / module / f"modeling_{module}.py"
        if source.exists() and "@use_experts_implementation" in source.read_text():
            found.append(model_type)
    return sorted(found)


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """Four layers, sixteen experts, a vocabulary of 128."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    settings = _OVERRIDES.get(model_type, {}) | overrides
    text = default.get_text_config()
    if text is default:
        return config_class(**_settings(default) | settings)
    others = {name: settings[name] for name in settings if name.endswith("_config")}
    of_text = {name: value for name, value in settings.items() if name not in others}
    return config_class(text_config=_settings(text) | of_text, **others)


def _settings(default: Any) -> dict[str, Any]:
    has = default.to_dict()
    found = {name: value for name, value in _SIZES.items() if has.get(name) is not None}
    if "qk_rope_head_dim" in found:
        found["head_dim"] = found["qk_rope_head_dim"]
        found["num_key_value_heads"] = found["num_attention_heads"]
    for name in _LAYER_LISTS:
        if has.get(name):
            distinct = list(dict.fromkeys(has[name]))
            found[name] = [distinct[n % len(distinct)] for n in range(NUM_LAYERS)]
    return found
