"""Hunyuan-A13B."""

from __future__ import annotations

from collections.abc import Mapping

from moe_edge.models.families.config import Config
from moe_edge.models.families.family import DENSE_WIDTH, Architecture, Checkpoint, Family, Value


def keys(config: Config) -> Mapping[str, Value | None]:
    n_shared, width = config.same_count("num_shared_expert", 1), config.count("intermediate_size")
    return {
        "expert_shared_feed_forward_length": n_shared * width,
        "expert_feed_forward_length": config.same_count("moe_intermediate_size", width),
        "expert_shared_count": n_shared,
    }


FAMILY = Family(
    "hunyuan",
    (Architecture("hunyuan-moe", DENSE_WIDTH, state_shared_width=True), Architecture("hy_v3", state_shared_width=True)),
    (
        Checkpoint(
            ("HunYuanMoEV1ForCausalLM",),
            "hunyuan-moe",
            keys=keys,
            defaults={"rms_norm_eps": 1e-5, "rope_theta": 10000.0},
            fixed={"hidden_act": "silu", "attention_bias": False},
        ),
    ),
    order=140,
)
