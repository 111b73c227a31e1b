"""dots.llm1."""

from __future__ import annotations

from collections.abc import Mapping

from moe_edge.models.families.config import Config
from moe_edge.models.families.family import Architecture, Checkpoint, Family, Value


def keys(config: Config) -> Mapping[str, Value | None]:
    return {
        "expert_feed_forward_length": config.count("moe_intermediate_size"),
        "leading_dense_block_count": config.size("first_k_dense_replace", 0),
        "expert_shared_count": config.size("n_shared_experts", 0),
        "expert_weights_scale": config.number("routed_scaling_factor", 1.0),
        "expert_weights_norm": bool(config.get("norm_topk_prob", False)),
        "expert_gating_func": 2,
    }


FAMILY = Family(
    "dots",
    (Architecture("dots1", count_times_width=True), Architecture("dots3note", count_times_width=True)),
    (
        Checkpoint(
            ("Dots1ForCausalLM",),
            "dots1",
            keys=keys,
            defaults={"rms_norm_eps": 1e-6, "rope_theta": 10000.0},
            needs_output=True,
            fixed={"hidden_act": "silu", "attention_bias": False},
        ),
    ),
    order=130,
)
