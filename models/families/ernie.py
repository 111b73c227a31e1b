"""ERNIE 4.5 with experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_edge.models.families.config import Config
from moe_edge.models.families.family import Architecture, Checkpoint, Family, Named, Tensors, Value
from moe_edge.models.families.tensors import reshaped
from moe_edge.models.formats.safetensors import SafeTensor


def keys(config: Config) -> Mapping[str, Value | None]:
    n_shared, width = config.size("moe_num_shared_experts", 0), config.count("moe_intermediate_size")
    return {
        "interleave_moe_layer_step": config.count("moe_layer_interval", 1),
        "leading_dense_block_count": config.size("moe_layer_start_index", 0),
        "expert_feed_forward_length": width,
        "expert_shared_count": n_shared,
        "expert_shared_feed_forward_length": n_shared * width if n_shared else None,
    }


def rename(config: Config, name: str) -> str | None:
    if ".mtp_" in name:
        return None
    return name.replace("ernie.", "model.", 1) if name.startswith("ernie.") else name


def dense(config: Config, name: str, tensor: SafeTensor, _: Tensors) -> Sequence[Named] | None:
    if name.endswith("e_score_correction.bias"):
        return [Named(name, reshaped(name, tensor, (tensor.shape[-1],)))]
    return None


FAMILY = Family(
    "ernie",
    (Architecture("ernie4_5-moe"),),
    (
        Checkpoint(
            ("Ernie4_5_MoeForCausalLM",),
            "ernie4_5-moe",
            keys=keys,
            defaults={"rms_norm_eps": 1e-5, "rope_theta": 500000.0},
            rename=rename,
            dense=dense,
            fixed={"hidden_act": "silu", "use_bias": False},
        ),
    ),
    order=110,
)
