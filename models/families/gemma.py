"""Gemma 4 with experts, its text part."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moe_edge.models.errors import UnknownName
from moe_edge.models.families.config import Config
from moe_edge.models.families.family import Architecture, Checkpoint, Experts, Family, Named, Tensors, Value
from moe_edge.models.families.tensors import value
from moe_edge.models.formats.gguf import TensorEntry
from moe_edge.models.formats.safetensors import SafeTensor, as_object

STACKED = re.compile(r"model\.layers\.(\d+)\.experts\.(gate_up|down)_proj(?:\.weight)?")
NOT_TURNED = 1e30  # a frequency factor that stops a dimension from turning


def full(config: Config, key: str, of_layer: str) -> Any:
    """A setting of the layers that attend to everything, under either of the names it has."""
    if config.get(key) is not None:
        return config.get(key)
    layers = as_object(config.get("per_layer_config", {}), config.path, "per_layer_config")
    kinds = config.texts("layer_types")
    for number, settings in layers.items():
        at = int(number) if str(number).isdigit() else len(kinds)
        if at < len(kinds) and kinds[at] == "full_attention" and isinstance(settings, dict) and of_layer in settings:
            return settings[of_layer]
    return config.get(of_layer)


def ropes(config: Config) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """(of full attention, of sliding attention)."""
    every, near = (
        as_object(config.rope.get(name), config.path, name) for name in ("full_attention", "sliding_attention")
    )
    if every.get("rope_type", "default") not in ("default", "proportional"):
        raise UnknownName(f"{config.path}: full_attention has rope_type '{every['rope_type']}'; known: proportional")
    return every, near


def keys(config: Config) -> Mapping[str, Value | None]:
    every, near = ropes(config)
    width, width_near = int(full(config, "global_head_dim", "head_dim")), config.count("head_dim")
    near_layers = [kind == "sliding_attention" for kind in config.texts("layer_types")]
    heads_kv = full(config, "num_global_key_value_heads", "num_key_value_heads")
    found: dict[str, Value | None] = {
        "rope.freq_base": config.as_number("rope_theta", every.get("rope_theta", 1e6)),
        "rope.freq_base_swa": config.as_number("rope_theta", near.get("rope_theta", 1e4)),
        "attention.sliding_window": config.count("sliding_window"),
        "attention.shared_kv_layers": config.size("num_kv_shared_layers", 0),
        "embedding_length_per_layer_input": config.size("hidden_size_per_layer_input", 0),
        "attention.sliding_window_pattern": near_layers,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.key_length_swa": width_near,
        "attention.value_length_swa": width_near,
        "expert_feed_forward_length": config.count("moe_intermediate_size"),
        "rope.dimension_count": width,
        "rope.dimension_count_swa": int(width_near * config.as_number("share", near.get("partial_rotary_factor", 1.0))),
    }
    if heads_kv != config.n_head_kv:
        found["attention.head_count_kv"] = [config.n_head_kv if is_near else heads_kv for is_near in near_layers]
    if config.get("final_logit_softcapping"):
        found["final_logit_softcapping"] = config.number("final_logit_softcapping")
    return found


def rename(config: Config, name: str) -> str | None:
    if name.startswith(("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio.")):
        return None
    name = name.replace("model.language_model.", "model.")
    name = re.sub(r"\.router\.per_expert_scale$", ".router.per_expert_scale.weight", name)
    return re.sub(r"\.(router\.scale|layer_scalar)$", r".\1.weight", name)


def dense(config: Config, name: str, tensor: SafeTensor, _: Tensors) -> Sequence[Named] | None:
    """Scales have a suffix of their own in GGUF."""
    layer = name.split(".layers.")[-1].split(".")[0]
    for ending, gguf_name in (
        (".router.per_expert_scale.weight", "ffn_down_exps.scale"),
        (".router.scale.weight", "ffn_gate_inp.scale"),
        (".layer_scalar.weight", "layer_output_scale.weight"),
    ):
        if name.endswith(ending):
            return [Named(f"blk.{layer}.{gguf_name}", tensor.entry(f"blk.{layer}.{gguf_name}"), is_gguf=True)]
    return None


def experts(config: Config, name: str, tensor: SafeTensor, _: Tensors) -> Experts | None:
    """Gate and up stay one matrix."""
    match = STACKED.fullmatch(name.replace("model.language_model.", "model."))
    if match is None or len(tensor.shape) != 3:
        return None
    n_expert, n_rows, n_cols = tensor.shape
    found: dict[tuple[int, int, str], TensorEntry] = {}
    for expert in range(min(n_expert, 1 << 13)):
        start = expert * (tensor.nbytes // n_expert)
        found[int(match[1]), expert, match[2]] = tensor.entry(f"{name}[{expert}]", start, (n_cols, n_rows))
    return found


def rope_factors(config: Config, tensors: Tensors) -> Sequence[Named]:
    """Full attention turns a share of each head's dimensions, the first of each half."""
    every, _ = ropes(config)
    half = int(full(config, "global_head_dim", "head_dim")) // 2
    turned = int(2 * half * config.as_number("partial_rotary_factor", every.get("partial_rotary_factor", 1.0)) / 2)
    factors = [1.0] * turned + [NOT_TURNED] * (half - turned)
    return [Named("rope_freqs.weight", value("rope_freqs.weight", next(iter(tensors.values())), factors), is_gguf=True)]


FAMILY = Family(
    "gemma",
    (Architecture("gemma4"),),
    (
        Checkpoint(
            ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
            "gemma4",
            keys=keys,
            defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"},
            rename=rename,
            dense=dense,
            experts=experts,
            extra=rope_factors,
            fixed={
                "enable_moe_block": True,
                "attention_bias": False,
                "use_double_wide_mlp": False,
                "hidden_activation": "gelu_pytorch_tanh",
            },
        ),
    ),
    order=150,
)
