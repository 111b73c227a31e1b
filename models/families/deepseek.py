"""DeepSeek V2 and V3, and those of their shape: GLM-4.7-Flash, Kimi-K2, Moonlight.

Attention is latent: llama.cpp reads one key head as wide as the latent, and takes the up-projection apart into one that
goes to the queries (k_b, turned) and one that goes to the output (v_b).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moe_edge.models.errors import BadFile
from moe_edge.models.families.config import Config
from moe_edge.models.families.family import Architecture, Checkpoint, Family, Named, Tensors, Value
from moe_edge.models.families.tensors import moved
from moe_edge.models.formats.safetensors import SafeTensor

if TYPE_CHECKING:  # numpy: not for the runtime, see derived.py
    from moe_edge.models.formats.derived import Array


def latent_keys(config: Config) -> Mapping[str, Value | None]:
    latent, rope, nope = (config.count(f"{key}") for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"))
    keys: dict[str, Value | None] = {
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps", 1e-6),
        "leading_dense_block_count": leading_dense(config),
        "vocab_size": config.count("vocab_size"),
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rope,
        "attention.value_length": latent,
        "attention.key_length_mla": nope + rope,
        "attention.value_length_mla": config.count("v_head_dim"),
        "expert_feed_forward_length": config.count("moe_intermediate_size"),
        "expert_shared_count": config.size("n_shared_experts", 0),
        "rope.dimension_count": rope,
    }
    if config.get("q_lora_rank") is not None:
        keys["attention.q_lora_rank"] = config.count("q_lora_rank")
    if config.get("routed_scaling_factor") is not None:
        keys["expert_weights_scale"] = config.number("routed_scaling_factor")
    if config.get("norm_topk_prob"):
        keys["expert_weights_norm"] = True
    if config.rope.get("mscale_all_dim"):
        # llama.cpp's converter writes a tenth of it, and its graph knows
        scale = config.as_number("mscale_all_dim", config.rope["mscale_all_dim"])
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * scale
    return keys


def leading_dense(config: Config) -> int:
    """Layers before the first with experts."""
    kinds = config.texts("mlp_layer_types")
    if kinds:
        return kinds.index("sparse") if "sparse" in kinds else len(kinds)
    return config.size("first_k_dense_replace", 0)


def sigmoid_keys(config: Config) -> Mapping[str, Value | None]:
    """V3's router: sigmoid, which its config.json names only in later releases."""
    return {**latent_keys(config), "expert_gating_func": 2}


def softmax_keys(config: Config) -> Mapping[str, Value | None]:
    return {**latent_keys(config), "expert_gating_func": 1}


def no_drafts(config: Config, name: str) -> str | None:
    """Without the layers behind the last, which predict several tokens."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return None if match and int(match[1]) >= config.n_layer else name


def latent(config: Config, name: str, tensor: SafeTensor, _: Tensors) -> Sequence[Named] | None:
    if not name.endswith("kv_b_proj.weight"):
        return None
    n_head, nope, v_dim = config.n_head, config.count("qk_nope_head_dim"), config.count("v_head_dim")
    n_rows, width = tensor.shape
    if n_rows != n_head * (nope + v_dim):
        raise BadFile(f"{tensor.path}: tensor '{name}' has {n_rows} rows, expected {n_head} heads of {nope} + {v_dim}")

    def heads(bits: Array) -> Array:
        return bits.reshape(n_head, nope + v_dim, width)

    keys, values = name.replace("kv_b_proj", "k_b_proj"), name.replace("kv_b_proj", "v_b_proj")
    return [
        Named(keys, moved(keys, tensor, (n_head, width, nope), lambda bits: heads(bits)[:, :nope].swapaxes(1, 2))),
        Named(values, moved(values, tensor, (n_head, v_dim, width), lambda bits: heads(bits)[:, nope:])),
    ]


DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "topk_method": "greedy", "rope_interleave": True}

COUNTED = (
    "deepseek2 deepseek deepseek2-ocr deepseek32 deepseek4 glm-dsa kimi-linear kimi-k3 mistral4 glm5-next hy_v4"
).split()

FAMILY = Family(
    "deepseek",
    tuple(Architecture(name, count_times_width=True) for name in COUNTED),
    (
        Checkpoint(
            ("DeepseekV2ForCausalLM",),
            "deepseek2",
            defaults=DEFAULTS,
            keys=softmax_keys,
            dense=latent,
            rename=no_drafts,
            fixed={"hidden_act": "silu", "attention_bias": False, "topk_method": ("greedy", "group_limited_greedy")},
        ),
        Checkpoint(
            ("DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM"),
            "deepseek2",
            defaults=DEFAULTS,
            keys=sigmoid_keys,
            dense=latent,
            rename=no_drafts,
            fixed={"hidden_act": "silu", "attention_bias": False, "rope_interleave": True},
        ),
    ),
    order=50,
)
