"""Mixtral, which llama.cpp runs as a llama with experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_edge.models.families.config import Config
from moe_edge.models.families.family import DENSE_WIDTH, Architecture, Checkpoint, Family, Named, Tensors, Value
from moe_edge.models.families.tensors import rope_rows
from moe_edge.models.formats.safetensors import SafeTensor


def llama_keys(config: Config) -> Mapping[str, Value]:
    return {"vocab_size": config.count("vocab_size"), "rope.dimension_count": config.head_dim}


def llama_rope(config: Config, name: str, tensor: SafeTensor, _: Tensors) -> Sequence[Named] | None:
    """Queries and keys in llama's order of the rope."""
    for projection, n_head in (("q_proj", config.n_head), ("k_proj", config.n_head_kv)):
        if name.endswith((f".{projection}.weight", f".{projection}.bias")):
            return [Named(name, rope_rows(name, tensor, n_head))]
    return None


FAMILY = Family(
    "mixtral",
    (Architecture("llama", DENSE_WIDTH),),
    (
        Checkpoint(
            ("MixtralForCausalLM",),
            "llama",
            defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6},
            keys=llama_keys,
            dense=llama_rope,
            fixed={"hidden_act": "silu", "sliding_window": None},
        ),
    ),
    order=20,
)
