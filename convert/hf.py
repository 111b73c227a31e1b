"""A Hugging Face checkpoint as a source: OlmoeForCausalLM and Qwen3MoeForCausalLM.

The key-values are those llama.cpp's converter writes. Settings that llama.cpp's graph of the architecture does not
follow are refused by name, since the converted model would run and be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from moe_edge.convert.tokenizer import read_tokenizer
from moe_edge.models.architectures import Architecture, find_hf_class
from moe_edge.models.errors import BadFile, NotMoE, UnknownName
from moe_edge.models.formats.files import read_file, shown
from moe_edge.models.formats.ggml_types import BF16, F16, F32
from moe_edge.models.formats.gguf import DEFAULT_ALIGNMENT, TensorEntry
from moe_edge.models.formats.keyvalues import parse_records
from moe_edge.models.formats.safetensors import (
    DTYPES,
    MAX_JSON,
    SafeTensor,
    SafeTensors,
    as_object,
    open_safetensors,
    read_json_file,
)
from moe_edge.models.formats.write import encode_kv, kv_string, kv_u32
from moe_edge.models.store.experts import MoELayer, make_layer
from moe_edge.models.store.source import MAX_EXPERTS, Source, sha256_of

_ONE = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_FUSED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(?:\.weight)?")
_USELESS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
_GGUF_F32 = 6
F32_MAX = 3.4e38
FILE_TYPES = {F32: 0, F16: 1, BF16: 32}  # llama.cpp's LLAMA_FTYPE
QUANTIZATION_VERSION = 2

Experts = dict[tuple[int, int, str], TensorEntry]


@dataclass(frozen=True)
class _Family:
    """What llama.cpp's graph of an architecture takes for granted: setting -> value; the first is also the default."""

    arch: Any
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]
    needs_output: bool  # the graph has no tied embedding: output.weight must be there


_COMMON: Mapping[str, Any] = {"hidden_act": "silu", "attention_bias": False, "rope_scaling": None}
_FAMILIES = {
    "olmoe": _Family(
        gguf.MODEL_ARCH.OLMOE,
        {**_COMMON, "norm_topk_prob": False, "clip_qkv": None},
        {"norm_topk_prob": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
        needs_output=True,
    ),
    "qwen3moe": _Family(
        gguf.MODEL_ARCH.QWEN3MOE,
        {
            **_COMMON,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,
        },
        {"norm_topk_prob": False, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
        needs_output=False,
    ),
}


def hf_source(folder: Path) -> Source:
    """The source a checkpoint folder makes: config.json, safetensors, tokenizer.json.

    Raises MissingFile, BadFile and its kind, NotMoE, UnknownName for a class, setting or tokenizer we cannot convert.
    """
    config_path = folder / "config.json"
    config = read_json_file(config_path)
    classes = config.get("architectures")
    if not isinstance(classes, list) or len(classes) != 1:
        raise BadFile(f"{config_path}: names the classes {shown(classes)} in 'architectures', expected one")
    architecture = find_hf_class(str(classes[0])[:100], str(config_path))
    family = _FAMILIES[architecture.name]
    _check_settings(config_path, config, family)
    checkpoint = open_safetensors(folder)
    names = {name for name in checkpoint.tensors if name.endswith(_USELESS)}
    experts = _find_experts(checkpoint, folder)
    layers = _layers(experts, folder)
    n_layer = _count(config_path, config, "num_hidden_layers")
    if n_layer != len(layers):  # before anything is made for each of them
        raise BadFile(f"{config_path}: num_hidden_layers is {n_layer}, but {len(layers)} layers have experts")
    expert_names = {name for name in checkpoint.tensors if _ONE.fullmatch(name) or _FUSED.fullmatch(name)}
    dense = _dense(checkpoint, names | expert_names, family, n_layer, config)
    _check_layers(config_path, config, layers, dense, n_layer)
    tokenizer = read_tokenizer(folder, config)
    vocab_rows = next(entry.shape[1] for entry in dense if entry.name == "token_embd.weight")
    if vocab_rows != len(tokenizer.tokens):
        raise BadFile(f"{folder}: the embedding has {vocab_rows} rows for {len(tokenizer.tokens)} tokens")
    file_type = FILE_TYPES[next(iter(experts.values())).type]
    name = folder.absolute().name
    records = _metadata(config_path, config, architecture, family, layers, name, file_type) | tokenizer.records()
    return Source(
        name=name,
        architecture=architecture,
        files=checkpoint.files,
        header_sha256=sha256_of((read_file(config_path, MAX_JSON), *checkpoint.headers)),
        kv=parse_records(records.values()),
        alignment=DEFAULT_ALIGNMENT,
        dense=dense,
        layers=layers,
        experts=experts,
        biases={},
        is_checkpoint=True,
        skipped=tuple(sorted(names)),
        notes=tokenizer.notes,
    )


def _check_settings(path: Path, config: Mapping[str, Any], family: _Family) -> None:
    """Refuse, by name, a setting that llama.cpp's graph of the architecture does not follow."""
    for key, needed in family.fixed.items():
        found = config.get(key, family.defaults.get(key, needed))
        if found != needed and not (found is None and not needed):
            raise UnknownName(f"{path}: {key} = {found!r} is not supported: llama.cpp computes with {needed!r}")
    if config.get("quantization_config"):
        method = as_object(config["quantization_config"], path, "quantization_config").get("quant_method")
        raise UnknownName(f"{path}: a checkpoint quantized with '{method}' is not supported; use the original one")
    rope = as_object(config.get("rope_parameters"), path, "rope_parameters")
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise UnknownName(f"{path}: rope_parameters = {rope!r} is not supported; known: rope_type 'default'")


def _find_experts(checkpoint: SafeTensors, folder: Path) -> Experts:
    experts: Experts = {}
    for name, tensor in checkpoint.tensors.items():
        if match := _ONE.fullmatch(name):
            layer, expert, projection = int(match[1]), int(match[2]), match[3]
            if len(tensor.shape) != 2:
                raise BadFile(f"{tensor.path}: tensor '{name}' has shape {list(tensor.shape)}, expected 2 dimensions")
            experts[layer, expert, projection] = tensor.entry(name)
        elif match := _FUSED.fullmatch(name):
            experts |= _fused_experts(int(match[1]), match[2], tensor)
    if not experts:
        raise NotMoE(f"{folder}: has no expert tensors (model.layers.N.mlp.experts.*)")
    return experts


def _fused_experts(layer: int, projection: str, tensor: SafeTensor) -> Experts:
    """Slices of [n_expert, rows, cols]; of gate_up the first half of the rows is gate."""
    parts = ("gate", "up") if projection == "gate_up" else ("down",)
    if len(tensor.shape) != 3 or tensor.shape[1] % len(parts):
        raise BadFile(f"{tensor.path}: tensor '{tensor.name}' has shape {list(tensor.shape)}, expected 3 dimensions")
    n_expert, rows, cols = tensor.shape
    if n_expert > MAX_EXPERTS:
        raise BadFile(f"{tensor.path}: tensor '{tensor.name}' has {n_expert} experts, at most {MAX_EXPERTS} are read")
    rows //= len(parts)
    nbytes = rows * cols * DTYPES[tensor.dtype]
    experts = {}
    for expert in range(n_expert):
        for number, part in enumerate(parts):
            start = (expert * len(parts) + number) * nbytes
            experts[layer, expert, part] = tensor.entry(f"{tensor.name}[{expert}].{part}", start, (cols, rows))
    return experts


def _layers(experts: Experts, folder: Path) -> tuple[MoELayer, ...]:
    shapes: dict[int, dict[str, tuple[int, int]]] = {}
    counts: dict[int, int] = {}
    for (number, expert, projection), entry in experts.items():
        counts[number] = max(counts.get(number, 0), expert + 1)
        if expert == 0:
            shapes.setdefault(number, {})[projection] = (entry.shape[0], entry.shape[1])
    layers = []
    for number in sorted(counts):
        layer = make_layer(number, counts[number], shapes.get(number, {}), str(folder))
        for expert in range(layer.n_expert):
            for projection in layer.projections:
                found = experts.get((number, expert, projection))
                if found is None or found.shape != layer.shape(projection):
                    raise BadFile(
                        f"{folder}: expert {expert} of layer {number}: {projection}_proj is "
                        f"{list(found.shape) if found else 'missing'}, expected {list(layer.shape(projection))}"
                    )
        layers.append(layer)
    return tuple(layers)


def _dense(
    checkpoint: SafeTensors, without: set[str], family: _Family, n_layer: int, config: Mapping[str, Any]
) -> tuple[TensorEntry, ...]:
    """The other tensors under their GGUF names, with a copy of a tied embedding where the graph needs one."""
    names = gguf.get_tensor_name_map(family.arch, n_layer)
    found: dict[str, TensorEntry] = {}
    for name, tensor in checkpoint.tensors.items():
        if name in without:
            continue
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None or mapped in found or not tensor.shape:
            raise BadFile(f"{tensor.path}: tensor '{name}' has no place in architecture {family.arch.name.lower()}")
        found[mapped] = tensor.entry(mapped)
    embedding = found.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise BadFile(f"{checkpoint.files[0]}: tensor 'model.embed_tokens.weight' is missing or not 2-dimensional")
    if config.get("tie_word_embeddings"):
        found.pop("output.weight", None)
    elif "output.weight" not in found:
        raise BadFile(f"{checkpoint.files[0]}: tensor 'lm_head.weight' is missing and tie_word_embeddings is not set")
    if family.needs_output and "output.weight" not in found:
        found["output.weight"] = TensorEntry("output.weight", *_all_but_name(embedding))
    return tuple(found.values())


def _all_but_name(entry: TensorEntry) -> tuple[tuple[int, ...], int, Path, int, int]:
    return entry.shape, entry.type, entry.path, entry.offset, entry.nbytes


def _check_layers(
    path: Path, config: Mapping[str, Any], layers: Sequence[MoELayer], dense: Sequence[TensorEntry], n_layer: int
) -> None:
    """Compare the tensors with the counts of config.json, which the metadata repeats."""
    if [layer.layer for layer in layers] != list(range(n_layer)):
        raise BadFile(f"{path}: num_hidden_layers is {n_layer}, but {len(layers)} layers have experts")
    needed = (_expert_count(path, config), _count(path, config, "hidden_size"))
    for layer in layers:
        if (layer.n_expert, layer.n_embd) != needed:
            raise BadFile(
                f"{path}: num_experts and hidden_size are {needed}, but layer {layer.layer} has "
                f"{layer.n_expert} experts of input width {layer.n_embd}"
            )
    shapes = {entry.name: entry.shape for entry in dense}
    for number in range(n_layer):
        for name in ("attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp"):
            if f"blk.{number}.{name}.weight" not in shapes:
                raise BadFile(f"{path}: the checkpoint lacks the tensor for 'blk.{number}.{name}.weight'")


def _metadata(
    path: Path,
    config: Mapping[str, Any],
    architecture: Architecture,
    family: _Family,
    layers: Sequence[MoELayer],
    name: str,
    file_type: int,
) -> dict[str, bytes]:
    heads = _count(path, config, "num_attention_heads")
    rope = as_object(config.get("rope_parameters"), path, "rope_parameters")
    theta = config.get("rope_theta", rope.get("rope_theta", family.defaults["rope_theta"]))
    numbers = {
        "block_count": len(layers),
        "context_length": _count(path, config, "max_position_embeddings"),
        "embedding_length": layers[0].n_embd,
        "feed_forward_length": _count(path, config, "intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": _count(path, config, "num_key_value_heads", heads),
        "expert_count": layers[0].n_expert,
        "expert_used_count": _count(path, config, "num_experts_per_tok"),
    }
    if numbers["expert_used_count"] > numbers["expert_count"]:
        raise BadFile(f"{path}: num_experts_per_tok is {numbers['expert_used_count']}, above num_experts")
    if config.get("head_dim") is not None:
        head_dim = _count(path, config, "head_dim")
        numbers |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if architecture.width_key == "expert_feed_forward_length":
        numbers["expert_feed_forward_length"] = layers[0].n_ff
    floats = {
        "rope.freq_base": _number(path, "rope_theta", theta),
        "attention.layer_norm_rms_epsilon": _number(
            path, "rms_norm_eps", config.get("rms_norm_eps", family.defaults["rms_norm_eps"])
        ),
    }
    records = {
        "general.architecture": kv_string("general.architecture", architecture.name),
        "general.type": kv_string("general.type", "model"),
        "general.name": kv_string("general.name", name),
        "general.file_type": kv_u32("general.file_type", file_type),
        "general.quantization_version": kv_u32("general.quantization_version", QUANTIZATION_VERSION),
    }
    for suffix, value in numbers.items():
        records[architecture.key(suffix)] = kv_u32(architecture.key(suffix), value)
    for suffix, number in floats.items():
        records[architecture.key(suffix)] = encode_kv(architecture.key(suffix), number, _GGUF_F32)
    return records


# What releases of transformers and the models' own code call the number of experts of a layer.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _expert_count(path: Path, config: Mapping[str, Any]) -> int:
    """Experts of a layer, under whichever name; where there are several they must agree. Raises BadFile."""
    named = {key: _count(path, config, key) for key in _EXPERT_COUNTS if config.get(key) is not None}
    if not named:
        names = ", ".join(_EXPERT_COUNTS)
        raise BadFile(f"{path}: does not say how many experts a layer has; it has none of {names}")
    if len(set(named.values())) > 1:
        said = ", ".join(f"{key} is {count}" for key, count in named.items())
        raise BadFile(f"{path}: contradicts itself about the number of experts: {said}")
    return next(iter(named.values()))


def _count(path: Path, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 1 << 31:
        raise BadFile(f"{path}: {key} is {shown(value)}, expected a positive number")
    return value


def _number(path: Path, key: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= F32_MAX:
        raise BadFile(f"{path}: {key} is {shown(value)}, expected a positive number")
    return float(value)
