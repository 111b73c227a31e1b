"""LFM2 with experts: short convolutions between the attention layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_edge.models.families.config import Config
from moe_edge.models.families.family import Architecture, Checkpoint, Family, Named, Tensors, Value
from moe_edge.models.families.tensors import reshaped
from moe_edge.models.formats.safetensors import SafeTensor


def keys(config: Config) -> Mapping[str, Value | None]:
    kinds = config.texts("layer_types")
    return {
        "attention.head_count_kv": [config.n_head_kv if kind == "full_attention" else 0 for kind in kinds],
        "expert_feed_forward_length": config.count("moe_intermediate_size"),
        "leading_dense_block_count": config.size("num_dense_layers", 0),
        "expert_gating_func": 2,
        "vocab_size": config.count("vocab_size"),
        "shortconv.l_cache": config.count("conv_L_cache"),
    }


def rename(config: Config, name: str) -> str | None:
    return name.replace(".expert_bias", ".expert_bias.bias")


def dense(config: Config, name: str, tensor: SafeTensor, _: Tensors) -> Sequence[Named] | None:
    if name.endswith("conv.conv.weight"):
        return [Named(name, reshaped(name, tensor, (tensor.shape[0], tensor.shape[-1])))]
    return None


FAMILY = Family(
    "lfm2",
    (Architecture("lfm2moe"),),
    (
        Checkpoint(
            ("Lfm2MoeForCausalLM",),
            "lfm2moe",
            keys=keys,
            defaults={
                "norm_eps": 1e-5,
                "rope_theta": 1e6,
                "norm_topk_prob": True,
                "use_expert_bias": True,
                "routed_scaling_factor": 1.0,
                "conv_bias": False,
            },
            rename=rename,
            dense=dense,
            fixed={"norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_expert_bias": True, "conv_bias": False},
        ),
    ),
    order=100,
)
