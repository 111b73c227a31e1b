"""MiniMax-M2, and the older ones of which only a GGUF is taken."""

from __future__ import annotations

from collections.abc import Mapping

from moe_edge.models.families.config import Config
from moe_edge.models.families.family import DENSE_WIDTH, Architecture, Checkpoint, Family, Value


def keys(config: Config) -> Mapping[str, Value | None]:
    share = config.rope.get("partial_rotary_factor", 1.0)
    rotary = config.get("rotary_dim") or int(config.head_dim * config.as_number("partial_rotary_factor", share))
    return {
        "expert_feed_forward_length": config.count("intermediate_size"),
        "rope.dimension_count": rotary,
        "expert_gating_func": 2,
    }


def rename(config: Config, name: str) -> str | None:
    return None if ".mtp_modules." in name else name


FAMILY = Family(
    "minimax",
    (
        Architecture("minimax-m2", DENSE_WIDTH),
        Architecture("minimax-01", DENSE_WIDTH),
        Architecture("minimax-m3", count_times_width=True),
    ),
    (
        Checkpoint(
            ("MiniMaxM2ForCausalLM",),
            "minimax-m2",
            keys=keys,
            defaults={"rms_norm_eps": 1e-6, "rope_theta": 5e6},
            rename=rename,
            needs_output=True,
            fixed={"hidden_act": "silu"},
        ),
    ),
    order=120,
)
