"""OLMoE."""

from __future__ import annotations

from moe_edge.models.families.family import DENSE_WIDTH, Architecture, Checkpoint, Family

FAMILY = Family(
    "olmoe",
    (Architecture("olmoe", DENSE_WIDTH),),
    (
        Checkpoint(
            ("OlmoeForCausalLM",),
            "olmoe",
            needs_output=True,
            defaults={"norm_topk_prob": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
            fixed={"hidden_act": "silu", "attention_bias": False, "norm_topk_prob": False, "clip_qkv": None},
        ),
    ),
    order=10,
)
