"""A qwen3_moe checkpoint as a GGUF file, in the bits that it has: bf16 matrices, f32 norms.

Run by the peers' own environment: `python -m tests.bench.peers.gguf_file SRC OUT`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

BF16, F32 = gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.F32
_PLAIN = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}
_OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
_OF_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


class Checkpoint:
    """A sharded checkpoint with an index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, str] = json.loads(
            (folder / "model.safetensors.index.json").read_text()
        )["weight_map"]
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.tokenizer: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())

    def read(self, name: str) -> Tensor:
        with safe_open(self._folder / self._files[name], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
            return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self._folder / self._files[name], framework="pt") as tensors:
            return tuple(tensors.get_slice(name).get_shape())


@dataclass(frozen=True)
class GgufTensor:
    """read: its values, made when they are written."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    read: Callable[[], Tensor]


def write(source: Path, out: Path) -> None:
    """Raises KeyError when `source` is not a qwen3_moe checkpoint with an expert a tensor."""
    checkpoint = Checkpoint(source)
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "qwen3moe")
    _describe(writer, checkpoint.config)
    _add_tokenizer(writer, checkpoint)
    tensors = list(_tensors(checkpoint))
    for tensor in tensors:
        # The type given here only says that the shape counts elements, not bytes.
        size = int(np.prod(tensor.shape)) * (2 if tensor.kind == BF16 else 4)
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=tensor.kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(_array(tensor))
    writer.close()
    partial.rename(out)


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    """Byte-level BPE. Prompts are given as token ids, so only spelling depends on it."""
    bpe = checkpoint.tokenizer["model"]
    special = {token["content"] for token in checkpoint.tokenizer["added_tokens"]}
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    kinds = [
        gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(checkpoint.config["bos_token_id"])
    writer.add_eos_token_id(checkpoint.config["eos_token_id"])
    writer.add_add_bos_token(False)


def _tensors(checkpoint: Checkpoint) -> Iterator[GgufTensor]:
    for name, theirs in _PLAIN.items():
        yield _one(checkpoint, name, theirs)
    for layer in range(checkpoint.config["num_hidden_layers"]):
        for name, theirs in _OF_LAYER.items():
            yield _one(
                checkpoint, f"model.layers.{layer}.{name}.weight", f"blk.{layer}.{theirs}.weight"
            )
        for name, theirs in _OF_EXPERTS.items():
            yield _stack(checkpoint, layer, name, f"blk.{layer}.{theirs}.weight")


def _one(checkpoint: Checkpoint, name: str, theirs: str) -> GgufTensor:
    """Vectors and the router in f32, as llama.cpp computes with them; matrices in bf16."""
    shape = checkpoint.shape(name)
    kind = F32 if len(shape) == 1 or "ffn_gate_inp" in theirs else BF16
    return GgufTensor(theirs, shape, kind, lambda: checkpoint.read(name))


def _stack(checkpoint: Checkpoint, layer: int, name: str, theirs: str) -> GgufTensor:
    """One matrix of every expert of a layer, [E, out, in]."""
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
        for expert in range(checkpoint.config["num_local_experts"])
    ]
    shape = (len(names), *checkpoint.shape(names[0]))
    return GgufTensor(theirs, shape, BF16, lambda: torch.stack([checkpoint.read(n) for n in names]))


def _array(tensor: GgufTensor) -> NDArray[Any]:
    values = tensor.read().contiguous()
    if tensor.kind == F32:
        return values.float().numpy()
    return values.view(torch.uint16).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a qwen3_moe checkpoint")
    parser.add_argument("out", type=Path, help="the file to write")
    chosen = parser.parse_args()
    write(chosen.source, chosen.out)


if __name__ == "__main__":
    main()
