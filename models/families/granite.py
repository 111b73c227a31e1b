"""IBM's Granite: with experts, and with state-space layers (Mamba-2) between the attention layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moe_edge.models.families.config import Config
from moe_edge.models.families.family import (
    DENSE_WIDTH,
    Architecture,
    Checkpoint,
    Experts,
    Family,
    Named,
    Tensors,
    Value,
)
from moe_edge.models.families.mixtral import llama_keys, llama_rope
from moe_edge.models.families.tensors import minus_exp, reshaped, rows
from moe_edge.models.formats.safetensors import SafeTensor

STACKED = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.(input|output)_linear\.weight")
SCALES = (
    ("attention_multiplier", "attention.scale"),
    ("embedding_multiplier", "embedding_scale"),
    ("residual_multiplier", "residual_scale"),
    ("logits_scaling", "logit_scale"),
)


def granite_keys(config: Config) -> Mapping[str, Value | None]:
    keys: dict[str, Value | None] = {**llama_keys(config), "attention.key_length": None, "attention.value_length": None}
    for name, key in SCALES:
        if config.get(name):
            keys[key] = config.number(name)
    if config.get("shared_intermediate_size"):
        keys["expert_shared_feed_forward_length"] = config.count("shared_intermediate_size")
    return keys


def attention_layers(config: Config) -> list[bool]:
    return [kind in ("attention", "full_attention") for kind in config.texts("layer_types")]


def hybrid_keys(config: Config) -> Mapping[str, Value | None]:
    n_heads = config.count("mamba_n_heads")
    return {
        **granite_keys(config),
        "attention.head_count_kv": [config.n_head_kv if attends else 0 for attends in attention_layers(config)],
        "context_length": 1 << 20,  # without a rope there is no limit but memory
        "ssm.conv_kernel": config.count("mamba_d_conv"),
        "ssm.state_size": config.count("mamba_d_state"),
        "ssm.group_count": config.count("mamba_n_groups"),
        "ssm.inner_size": config.count("mamba_expand") * config.n_embd,
        "ssm.time_step_rank": n_heads,
        "rope.scaling.finetuned": False,  # tells llama.cpp that there is no rope
    }


def experts(config: Config, name: str, tensor: SafeTensor, _: Tensors) -> Experts | None:
    match = STACKED.fullmatch(name)
    if match is None or len(tensor.shape) != 3:
        return None
    n_expert, n_rows, n_cols = tensor.shape
    parts = ("gate", "up") if match[2] == "input" else ("down",)
    each = n_rows // len(parts)
    nbytes = tensor.nbytes // n_expert // len(parts)
    return {
        (int(match[1]), expert, part): tensor.entry(
            f"{name}[{expert}].{part}", (expert * len(parts) + at) * nbytes, (n_cols, each)
        )
        for expert in range(min(n_expert, 1 << 13))
        for at, part in enumerate(parts)
    }


def shared_expert(config: Config, name: str, tensor: SafeTensor) -> Sequence[Named] | None:
    """The shared expert's gate and up are one matrix."""
    layer = name.split(".layers.")[-1].split(".")[0]
    if name.endswith("shared_mlp.output_linear.weight"):
        down = f"blk.{layer}.ffn_down_shexp.weight"
        return [Named(down, tensor.entry(down), is_gguf=True)]
    if not name.endswith("shared_mlp.input_linear.weight"):
        return None
    half = tensor.shape[0] // 2
    names = [f"blk.{layer}.ffn_{part}_shexp.weight" for part in ("gate", "up")]
    return [Named(each, rows(each, tensor, at * half, (at + 1) * half), is_gguf=True) for at, each in enumerate(names)]


def dense(config: Config, name: str, tensor: SafeTensor, tensors: Tensors) -> Sequence[Named] | None:
    return shared_expert(config, name, tensor) or llama_rope(config, name, tensor, tensors)


def hybrid_dense(config: Config, name: str, tensor: SafeTensor, _: Tensors) -> Sequence[Named] | None:
    """Without a rope nothing of the attention is turned."""
    if name.endswith(".mamba.A_log"):
        return [Named(name, minus_exp(name, tensor, (tensor.shape[0], 1)))]
    if name.endswith(".mamba.D"):
        return [Named(name, reshaped(name, tensor, (tensor.shape[0], 1)))]
    if name.endswith(".mamba.conv1d.weight"):
        return [Named(name, reshaped(name, tensor, (tensor.shape[0], tensor.shape[-1])))]
    if name.endswith(".mamba.norm.weight"):
        n_group = config.count("mamba_n_groups")
        return [Named(name, reshaped(name, tensor, (n_group, tensor.shape[0] // n_group)))]
    return shared_expert(config, name, tensor)


def rename(config: Config, name: str) -> str | None:
    return name.replace(".mamba.dt_bias", ".mamba.dt_proj.bias")


DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
FIXED = {"hidden_act": "silu", "attention_bias": False}

FAMILY = Family(
    "granite",
    tuple(Architecture(name, DENSE_WIDTH) for name in ("granitemoe", "granite_swa", "granite", "granitehybrid")),
    (
        Checkpoint(
            ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
            "granitemoe",
            keys=granite_keys,
            dense=dense,
            experts=experts,
            defaults=DEFAULTS,
            fixed=FIXED,
        ),
        Checkpoint(
            ("GraniteMoeHybridForCausalLM",),
            "granitehybrid",
            keys=hybrid_keys,
            dense=hybrid_dense,
            experts=experts,
            rename=rename,
            defaults=DEFAULTS,
            fixed={**FIXED, "position_embedding_type": ("nope", None), "mamba_proj_bias": False},
        ),
    ),
    order=70,
)
