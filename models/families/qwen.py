"""Qwen's mixtures with plain attention: Qwen1.5-MoE, Qwen2-MoE, Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Mapping

from moe_edge.models.families.config import Config
from moe_edge.models.families.family import Architecture, Checkpoint, Family, Value

DEFAULTS = {"norm_topk_prob": False, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
COMMON = {"hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False}


def qwen_keys(config: Config) -> Mapping[str, Value | None]:
    """The widths of experts and shared experts. A head's width counts only where it is stated."""
    keys: dict[str, Value | None] = {"expert_feed_forward_length": config.count("moe_intermediate_size")}
    if config.get("shared_expert_intermediate_size") is not None:
        keys["expert_shared_feed_forward_length"] = config.count("shared_expert_intermediate_size")
    return keys


FAMILY = Family(
    "qwen",
    tuple(Architecture(name) for name in ("qwen2moe", "qwen3moe", "qwen3vlmoe", "qwen4exp")),
    (
        Checkpoint(
            ("Qwen2MoeForCausalLM",),
            "qwen2moe",
            keys=qwen_keys,
            defaults=DEFAULTS,
            fixed={**COMMON, "norm_topk_prob": False},
            needs_output=True,
        ),
        Checkpoint(
            ("Qwen3MoeForCausalLM",),
            "qwen3moe",
            keys=qwen_keys,
            defaults=DEFAULTS,
            fixed={**COMMON, "norm_topk_prob": True, "attention_bias": False},
        ),
    ),
    order=30,
)
