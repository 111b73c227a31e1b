"""Small checkpoints for the tests: random Hugging Face folders, and GGUFs with stacked experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from moe_edge.convert.quantize import quantize
from moe_edge.models.formats.ggml_types import BY_NAME
from moe_edge.models.store.store import ExpertModel
from test_safetensors import to_bf16, write_safetensors
from test_tokenizer import train, write_tokenizer

N_LAYER, N_EXPERT, N_EMBD, N_FF, N_HEAD = 2, 4, 256, 512, 4
RNG = np.random.default_rng(7)


def floats(*shape: int) -> np.ndarray:
    """Values bfloat16 holds exactly."""
    bits = to_bf16(RNG.standard_normal(shape).astype(np.float32) * 0.1).astype(np.uint32) << 16
    return bits.view(np.float32)


def olmoe_config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["OlmoeForCausalLM"], "hidden_size": N_EMBD, "intermediate_size": N_FF,
        "num_hidden_layers": N_LAYER, "num_attention_heads": N_HEAD, "num_key_value_heads": N_HEAD,
        "num_experts": N_EXPERT, "num_experts_per_tok": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "norm_topk_prob": False, "tie_word_embeddings": False,
        "clip_qkv": None, "rope_scaling": None, "attention_bias": False,
    } | changes  # fmt: skip


def qwen3_config(**changes: Any) -> dict[str, Any]:
    keys = {
        "architectures": ["Qwen3MoeForCausalLM"], "intermediate_size": 1024, "moe_intermediate_size": N_FF,
        "norm_topk_prob": True, "head_dim": 32, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False,
    }  # fmt: skip
    return olmoe_config(**keys) | changes


def checkpoint_tensors(config: dict[str, Any], n_vocab: int, fused: bool = False) -> dict[str, np.ndarray]:
    head = config.get("head_dim", N_EMBD // N_HEAD)
    n_q, n_kv = head * N_HEAD, head * config["num_key_value_heads"]
    norms = (head, head) if "head_dim" in config else (n_q, n_kv)
    tensors = {"model.embed_tokens.weight": floats(n_vocab, N_EMBD), "model.norm.weight": floats(N_EMBD)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = floats(n_vocab, N_EMBD)
    for layer in range(N_LAYER):
        p = f"model.layers.{layer}."
        shapes = {
            "input_layernorm": (N_EMBD,), "post_attention_layernorm": (N_EMBD,), "mlp.gate": (N_EXPERT, N_EMBD),
            "self_attn.q_proj": (n_q, N_EMBD), "self_attn.k_proj": (n_kv, N_EMBD), "self_attn.v_proj": (n_kv, N_EMBD),
            "self_attn.o_proj": (N_EMBD, n_q), "self_attn.q_norm": norms[:1], "self_attn.k_norm": norms[1:],
        }  # fmt: skip
        tensors |= {f"{p}{name}.weight": floats(*shape) for name, shape in shapes.items()}
        up, gate, down = (floats(N_EXPERT, *shape) for shape in ((N_FF, N_EMBD), (N_FF, N_EMBD), (N_EMBD, N_FF)))
        if fused:
            tensors[f"{p}mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
            tensors[f"{p}mlp.experts.down_proj"] = down
            continue
        for expert in range(N_EXPERT):
            for name, stack in (("up", up), ("gate", gate), ("down", down)):
                tensors[f"{p}mlp.experts.{expert}.{name}_proj.weight"] = stack[expert]
    return tensors


def write_checkpoint(folder: Path, config: dict[str, Any] | None = None, fused: bool = False) -> Path:
    """A random Hugging Face folder in bfloat16."""
    folder.mkdir()
    config = config or olmoe_config()
    reference = train("gpt-2")
    write_tokenizer(folder, reference)
    config.setdefault("vocab_size", reference.get_vocab_size() + 3)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = checkpoint_tensors(config, config["vocab_size"], fused)
    write_safetensors(folder / "model.safetensors", {n: ("BF16", to_bf16(a)) for n, a in tensors.items()})
    return folder


def write_stock(
    path: Path, architecture: str = "olmoe", kind: str = "F32", bias: bool = False, n_ff: int = N_FF
) -> Path:
    """A GGUF with stacked experts of one type and two dense tensors; enough for us, not for llama.cpp."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("general.name", "random")
    widths = {"feed_forward_length": n_ff, "expert_feed_forward_length": n_ff, "expert_used_count": 2}
    for key, value in widths.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_tensor("token_embd.weight", floats(64, N_EMBD))
    for layer in range(N_LAYER):
        writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", floats(N_EXPERT, N_EMBD))
        for name, shape in (("gate", (n_ff, N_EMBD)), ("up", (n_ff, N_EMBD)), ("down", (N_EMBD, n_ff))):
            rows = floats(N_EXPERT * shape[0], shape[1])
            data = np.frombuffer(quantize(rows, BY_NAME[kind].id), np.uint8).reshape(N_EXPERT, shape[0], -1)
            writer.add_tensor(f"blk.{layer}.ffn_{name}_exps.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
            if bias:
                writer.add_tensor(f"blk.{layer}.ffn_{name}_exps.bias", floats(N_EXPERT, shape[0]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def piece_bytes(model: ExpertModel, index: int) -> bytes:
    piece = model.pieces[index]
    return model.files[piece.file].read_bytes()[piece.offset : piece.offset + piece.nbytes]
