"""GLM-4.5 and later with plain attention."""

from __future__ import annotations

from collections.abc import Mapping

from moe_edge.models.families.config import Config
from moe_edge.models.families.deepseek import leading_dense, no_drafts
from moe_edge.models.families.family import Architecture, Checkpoint, Family, Value


def keys(config: Config) -> Mapping[str, Value | None]:
    share = config.rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
    return {
        "rope.dimension_count": int(config.head_dim * config.as_number("partial_rotary_factor", share)),
        "expert_feed_forward_length": config.count("moe_intermediate_size"),
        "expert_shared_count": config.size("n_shared_experts", 0),
        "leading_dense_block_count": leading_dense(config),
        "expert_gating_func": 2,
        "expert_weights_scale": config.number("routed_scaling_factor", 1.0),
        "expert_weights_norm": bool(config.get("norm_topk_prob", True)),
    }


FAMILY = Family(
    "glm",
    (Architecture("glm4moe", count_times_width=True),),
    (
        Checkpoint(
            ("Glm4MoeForCausalLM",),
            "glm4moe",
            keys=keys,
            defaults={"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "norm_topk_prob": True},
            rename=no_drafts,
            fixed={"hidden_act": "silu"},
        ),
    ),
    order=90,
)
