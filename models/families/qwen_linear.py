"""Qwen's mixtures with linear attention in three layers of four: Qwen3-Next, and the text part of Qwen3.5-MoE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moe_edge.models.errors import BadFile
from moe_edge.models.families.config import Config
from moe_edge.models.families.family import Architecture, Checkpoint, Family, Named, Tensors, Value
from moe_edge.models.families.qwen import qwen_keys
from moe_edge.models.families.tensors import minus_exp, moved, plus_one, reshaped
from moe_edge.models.formats.safetensors import SafeTensor

if TYPE_CHECKING:  # numpy: not for the runtime, see derived.py
    from moe_edge.models.formats.derived import Array


def linear_keys(config: Config) -> Mapping[str, Value | None]:
    keys = dict(qwen_keys(config))
    n_value = config.count("linear_num_value_heads")
    kinds = config.texts("layer_types")
    if kinds and len(kinds) != config.n_layer:
        raise BadFile(f"{config.path}: layer_types has {len(kinds)} entries for {config.n_layer} layers")
    if kinds:
        keys["attention.recurrent_layers"] = [kind == "linear_attention" for kind in kinds]
    share = config.rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.25))
    return keys | {
        "ssm.conv_kernel": config.count("linear_conv_kernel_dim"),
        "ssm.state_size": config.count("linear_key_head_dim"),
        "ssm.group_count": config.count("linear_num_key_heads"),
        "ssm.time_step_rank": n_value,
        "ssm.inner_size": config.count("linear_value_head_dim") * n_value,
        "full_attention_interval": config.count("full_attention_interval", 4),
        "rope.dimension_count": int(config.head_dim * config.as_number("partial_rotary_factor", share)),
    }


def rename(config: Config, name: str) -> str | None:
    """Without the layers that predict several tokens, and without the picture part."""
    if name.startswith(("mtp.", "model.mtp.", "model.visual.", "visual.")):
        return None
    name = name.replace("model.language_model.", "model.")
    return name.replace(".dt_bias", ".dt_proj.bias")


def dense(config: Config, name: str, tensor: SafeTensor, _: Tensors) -> Sequence[Named] | None:
    if name.endswith(".A_log"):
        return [Named(name, minus_exp(name, tensor))]
    if name.endswith("conv1d.weight"):
        return [Named(name, reshaped(name, tensor, (tensor.shape[0], tensor.shape[-1])))]
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return [Named(name, plus_one(name, tensor))]
    if name.endswith("in_proj_qkvz.weight"):
        return split_qkvz(config, name, tensor)
    return None


def split_qkvz(config: Config, name: str, tensor: SafeTensor) -> Sequence[Named]:
    """Rows [q, k, v, z] of each key head in turn -> all of q, k and v, one behind the other; and z."""
    import numpy as np

    n_key, n_value = config.count("linear_num_key_heads"), config.count("linear_num_value_heads")
    key, wide = config.count("linear_key_head_dim"), n_value // n_key * config.count("linear_value_head_dim")
    ends = np.cumsum([0, key, key, wide, wide])
    n_rows, n_cols = tensor.shape
    if n_rows != n_key * int(ends[-1]):
        raise BadFile(f"{tensor.path}: tensor '{name}' has {n_rows} rows, expected {n_key * int(ends[-1])}")

    def parts(bits: Array, which: Sequence[int]) -> Array:
        heads = bits.reshape(n_key, int(ends[-1]), n_cols)
        return np.concatenate([heads[:, ends[i] : ends[i + 1]].reshape(-1, n_cols) for i in which])

    layer = name.split(".layers.")[1].split(".")[0]
    n_z = n_key * wide
    qkv, z = f"blk.{layer}.attn_qkv.weight", f"blk.{layer}.attn_gate.weight"
    return [
        Named(qkv, moved(qkv, tensor, (n_rows - n_z, n_cols), lambda bits: parts(bits, (0, 1, 2))), is_gguf=True),
        Named(z, moved(z, tensor, (n_z, n_cols), lambda bits: parts(bits, (3,))), is_gguf=True),
    ]


# ---- Qwen3.5: projections apart, and value heads in another order


def tiled(bits: Array, n_key: int, n_value: int, width: int) -> Array:
    """Value heads from grouped by key head to one of every key head in turn, as ggml repeats key heads."""
    groups = bits.reshape(n_key, n_value // n_key, width, *bits.shape[1:])
    turned: Array = groups.swapaxes(0, 1).reshape(bits.shape)
    return turned


def dense35(config: Config, name: str, tensor: SafeTensor, tensors: Tensors) -> Sequence[Named] | None:
    import numpy as np

    n_key, n_value = config.count("linear_num_key_heads"), config.count("linear_num_value_heads")
    key, value = config.count("linear_key_head_dim"), config.count("linear_value_head_dim")

    def heads(bits: Array, width: int) -> Array:
        return tiled(bits, n_key, n_value, width)

    def behind_keys(bits: Array) -> Array:
        return np.concatenate((bits[: 2 * n_key * key], heads(bits[2 * n_key * key :], value)))

    def in_columns(bits: Array) -> Array:
        return np.ascontiguousarray(heads(bits.T, value).T)

    if ".linear_attn." not in name:
        return dense(config, name, tensor, tensors)
    if name.endswith(".A_log"):
        decay = minus_exp(name, tensor)
        make = decay.make
        return [
            Named(
                name,
                type(decay)(
                    decay.name,
                    decay.shape,
                    decay.type,
                    decay.path,
                    decay.offset,
                    decay.nbytes,
                    decay.parts,
                    decay.part_shapes,
                    lambda parts: heads(make(parts), 1),
                ),
            )
        ]
    if name.endswith((".dt_proj.bias", "in_proj_a.weight", "in_proj_b.weight")):
        return [Named(name, moved(name, tensor, tensor.shape, lambda bits: heads(bits, 1)))]
    if name.endswith("in_proj_z.weight"):
        return [Named(name, moved(name, tensor, tensor.shape, lambda bits: heads(bits, value)))]
    if name.endswith("in_proj_qkv.weight"):
        return [Named(name, moved(name, tensor, tensor.shape, behind_keys))]
    if name.endswith("conv1d.weight"):
        shape = (tensor.shape[0], tensor.shape[-1])
        return [Named(name, moved(name, tensor, shape, lambda bits: behind_keys(bits.reshape(shape))))]
    if name.endswith("out_proj.weight"):
        return [Named(name, moved(name, tensor, tensor.shape, in_columns))]
    return None


def keys35(config: Config) -> Mapping[str, Value | None]:
    sections = config.rope.get("mrope_section") or [0, 0, 0]
    if not isinstance(sections, list) or len(sections) > 4 or not all(type(each) is int for each in sections):
        raise BadFile(f"{config.path}: mrope_section is {sections!r}, expected up to four numbers")
    keys = dict(linear_keys(config))
    turned = keys["rope.dimension_count"]
    assert isinstance(turned, int)
    of_text = [*sections, 0, 0, 0, 0][:4] if any(sections) else [turned // 2, 0, 0, 0]  # where all positions agree
    return {**keys, "rope.dimension_sections": of_text}


DEFAULTS = {"norm_topk_prob": True, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
FIXED = {"hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}

FAMILY = Family(
    "qwen-linear",
    (Architecture("qwen3next"), Architecture("qwen35moe")),
    (
        Checkpoint(
            ("Qwen3NextForCausalLM",),
            "qwen3next",
            keys=linear_keys,
            defaults=DEFAULTS,
            rename=rename,
            dense=dense,
            fixed={**FIXED, "attention_bias": False},
        ),
        Checkpoint(
            ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
            "qwen35moe",
            keys=keys35,
            defaults=DEFAULTS,
            rename=rename,
            dense=dense35,
            fixed={"hidden_act": "silu", "attention_bias": False},
        ),
    ),
    order=40,
)
