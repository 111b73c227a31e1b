"""A Hugging Face checkpoint as a source. What differs between models is in models/families, one file a family.

The key-values are those llama.cpp's converter writes. Settings that llama.cpp's graph of the architecture does not
follow are refused by name, since the converted model would run and be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
from moe_edge.convert.tokenizer import read_tokenizer
from moe_edge.models.architectures import find_hf_class
from moe_edge.models.errors import BadFile, NotMoE, UnknownName
from moe_edge.models.families import ARCHITECTURES
from moe_edge.models.families.config import Config, common_keys
from moe_edge.models.families.family import Architecture, Checkpoint, Keys, Named, Value
from moe_edge.models.families.fp8 import with_scales
from moe_edge.models.formats.files import read_file, shown
from moe_edge.models.formats.ggml_types import BF16, F16, F32
from moe_edge.models.formats.gguf import DEFAULT_ALIGNMENT, TensorEntry
from moe_edge.models.formats.keyvalues import ARRAY, STRING, parse_records
from moe_edge.models.formats.safetensors import (
    MAX_JSON,
    SafeTensor,
    as_object,
    open_safetensors,
    read_json_file,
)
from moe_edge.models.formats.write import BOOL, U32, encode_kv, kv_string, kv_u32
from moe_edge.models.store.experts import MoELayer, make_layer
from moe_edge.models.store.source import MAX_EXPERTS, Source, sha256_of

_ONE = re.compile(
    r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe|feed_forward)\.experts\.(\d+)\."
    r"(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight"
)
_PROJECTIONS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w2": "down", "w3": "up"}
_FUSED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(?:\.weight)?")
_SELECTION_BIAS = ("e_score_correction_bias", "e_score_correction.bias")  # gguf's table has it with a suffix
_USELESS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
_I32, _F32 = 5, 6  # of GGUF
_MXFP4 = 39
FILE_TYPES = {F32: 0, F16: 1, BF16: 32, _MXFP4: 38}  # llama.cpp's LLAMA_FTYPE
QUANTIZATION_VERSION = 2

Experts = dict[tuple[int, int, str], TensorEntry]


def hf_source(folder: Path) -> Source:
    """The source a checkpoint folder makes: config.json, safetensors, a tokenizer.

    Raises MissingFile, BadFile and its kind, NotMoE, UnknownName for a class, setting or tokenizer we cannot convert.
    """
    config_path = folder / "config.json"
    values = read_json_file(config_path)
    classes = values.get("architectures")
    if not isinstance(classes, list) or len(classes) != 1:
        raise BadFile(f"{config_path}: names the classes {shown(classes)} in 'architectures', expected one")
    kind = find_hf_class(str(classes[0])[:100], str(config_path))
    config = Config(config_path, _of_text(config_path, values, kind))
    _check_settings(config, kind)
    checkpoint = open_safetensors(folder)
    read = _Reading(config, kind, checkpoint.tensors)
    read.all()
    if not read.experts:
        raise NotMoE(f"{folder}: has no expert tensors (model.layers.N.mlp.experts.*)")
    layers = _layers(read.experts, folder)
    _check_layers(config, layers)
    dense = read.named(checkpoint.files[0])
    _check_routers(config, layers, dense)
    tokenizer = read_tokenizer(folder, config.values)
    vocab_rows = next(entry.shape[1] for entry in dense if entry.name == "token_embd.weight")
    if vocab_rows != len(tokenizer.tokens):
        raise BadFile(f"{folder}: the embedding has {vocab_rows} rows for {len(tokenizer.tokens)} tokens")
    file_type = FILE_TYPES[next(iter(read.experts.values())).type]
    name = folder.absolute().name
    architecture = ARCHITECTURES[kind.architecture]
    records = _records(architecture, _keys(config, kind, architecture, layers), name, file_type) | tokenizer.records()
    return Source(
        name=name,
        architecture=architecture,
        files=checkpoint.files,
        header_sha256=sha256_of((read_file(config_path, MAX_JSON), *checkpoint.headers)),
        kv=parse_records(records.values()),
        alignment=DEFAULT_ALIGNMENT,
        dense=dense,
        layers=layers,
        experts=read.experts,
        biases=dict(kind.biases(config, read.tensors)),
        is_checkpoint=True,
        skipped=tuple(sorted(read.skipped)),
        notes=tokenizer.notes,
    )


def _of_text(path: Path, values: Mapping[str, Any], kind: Checkpoint) -> dict[str, Any]:
    """The settings of the text model: a model that also sees has them one level down."""
    text = as_object(values.get("text_config"), path, "text_config")
    return {**kind.defaults, **values, **text}


def _check_settings(config: Config, kind: Checkpoint) -> None:
    """Refuse, by name, a setting that llama.cpp's graph of the architecture does not follow."""
    for key, needed in kind.fixed.items():
        can = needed if isinstance(needed, tuple) else (needed,)
        found = config.values.get(key, can[0])
        if found not in can and not (found is None and not can[0]):
            raise UnknownName(f"{config.path}: {key} = {found!r} is not supported: llama.cpp computes with {can[0]!r}")
    quantized = as_object(config.get("quantization_config"), config.path, "quantization_config")
    method = quantized.get("quant_method")
    by_floats = method == "compressed-tensors" and quantized.get("format") in ("float-quantized", "naive-quantized")
    if quantized and method not in ("fp8", "mxfp4") and not by_floats:
        raise UnknownName(
            f"{config.path}: a checkpoint quantized with '{method}' is not supported; use the original one"
        )


class _Reading:
    """The tensors of a checkpoint, sorted into experts, dense tensors and what is left out."""

    def __init__(self, config: Config, kind: Checkpoint, tensors: Mapping[str, SafeTensor]) -> None:
        self.tensors, scales = with_scales(tensors)
        self.experts: Experts = {}
        self.skipped: list[str] = scales
        self._dense: list[tuple[str, Named]] = []  # with the tensor's name, for messages
        self._config, self._kind = config, kind

    def all(self) -> None:
        """Look at every tensor. Raises BadFile for one with a shape that cannot be."""
        for name, tensor in self.tensors.items():
            known = self._kind.rename(self._config, name.replace(*_SELECTION_BIAS))
            if known is None or name.endswith(_USELESS):
                self.skipped.append(name)
                continue
            found = self._kind.experts(self._config, known, tensor, self.tensors)
            if found is None:
                found = _known_experts(known, tensor)
            if found is not None:
                self.experts |= found
                continue
            made = self._kind.dense(self._config, known, tensor, self.tensors)
            whole = [Named(known, tensor.entry(known))] if made is None else made
            self._dense += [(name, each) for each in whole]
        self._dense += [(each.name, each) for each in self._kind.extra(self._config, self.tensors)]

    def named(self, where: Path) -> tuple[TensorEntry, ...]:
        """Dense tensors under their GGUF names, with a copy of a tied embedding where the graph needs one."""
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self._kind.architecture)
        names = gguf.get_tensor_name_map(arch, self._config.n_layer)
        found: dict[str, TensorEntry] = {}
        for name, each in self._dense:
            mapped = each.name if each.is_gguf else names.get_name(each.name, try_suffixes=(".weight", ".bias"))
            if mapped is None or (mapped in found and each.name == name) or not each.entry.shape:
                raise BadFile(f"{each.entry.path}: tensor '{name}' has no place in architecture {arch.name.lower()}")
            found.setdefault(mapped, replace(each.entry, name=mapped))
        embedding = found.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise BadFile(f"{where}: tensor 'model.embed_tokens.weight' is missing or not 2-dimensional")
        if self._config.get("tie_word_embeddings"):
            found.pop("output.weight", None)
        elif "output.weight" not in found:
            raise BadFile(f"{where}: tensor 'lm_head.weight' is missing and tie_word_embeddings is not set")
        if self._kind.needs_output and "output.weight" not in found:
            found["output.weight"] = replace(embedding, name="output.weight")
        return tuple(found.values())


def _known_experts(name: str, tensor: SafeTensor) -> Experts | None:
    """Experts one by one, or stacked with gate above up, as most checkpoints have them."""
    if match := _ONE.fullmatch(name):
        if len(tensor.shape) != 2:
            raise BadFile(f"{tensor.path}: tensor '{name}' has shape {list(tensor.shape)}, expected 2 dimensions")
        return {(int(match[1]), int(match[2]), _PROJECTIONS[match[3]]): tensor.entry(name)}
    if match := _FUSED.fullmatch(name):
        return _fused_experts(int(match[1]), match[2], tensor)
    return None


def _fused_experts(layer: int, projection: str, tensor: SafeTensor) -> Experts:
    """Slices of [n_expert, rows, cols]; of gate_up the first half of the rows is gate."""
    parts = ("gate", "up") if projection == "gate_up" else ("down",)
    if len(tensor.shape) != 3 or tensor.shape[1] % len(parts):
        raise BadFile(f"{tensor.path}: tensor '{tensor.name}' has shape {list(tensor.shape)}, expected 3 dimensions")
    n_expert, n_rows, n_cols = tensor.shape
    if n_expert > MAX_EXPERTS:
        raise BadFile(f"{tensor.path}: tensor '{tensor.name}' has {n_expert} experts, at most {MAX_EXPERTS} are read")
    n_rows //= len(parts)
    nbytes = tensor.nbytes // n_expert // len(parts)
    experts = {}
    for expert in range(n_expert):
        for number, part in enumerate(parts):
            start = (expert * len(parts) + number) * nbytes
            experts[layer, expert, part] = tensor.entry(f"{tensor.name}[{expert}].{part}", start, (n_cols, n_rows))
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


def _check_layers(config: Config, layers: Sequence[MoELayer]) -> None:
    """Compare the experts with the counts of config.json, which the metadata repeats."""
    n_layer, numbers = config.n_layer, [layer.layer for layer in layers]
    if numbers != list(range(numbers[0], n_layer)):  # before anything is made for each of them
        raise BadFile(f"{config.path}: num_hidden_layers is {n_layer}, but {len(layers)} layers have experts")
    needed = (config.n_expert, config.n_embd)
    for layer in layers:
        if (layer.n_expert, layer.n_embd) != needed:
            raise BadFile(
                f"{config.path}: num_experts and hidden_size are {needed}, but layer {layer.layer} has "
                f"{layer.n_expert} experts of input width {layer.n_embd}"
            )


def _check_routers(config: Config, layers: Sequence[MoELayer], dense: Sequence[TensorEntry]) -> None:
    names = {entry.name for entry in dense}
    for number in range(config.n_layer):
        if f"blk.{number}.attn_norm.weight" not in names:
            raise BadFile(f"{config.path}: the checkpoint lacks the tensor for 'blk.{number}.attn_norm.weight'")
    for layer in layers:
        if f"blk.{layer.layer}.ffn_gate_inp.weight" not in names:
            raise BadFile(f"{config.path}: the checkpoint lacks the tensor for 'blk.{layer.layer}.ffn_gate_inp.weight'")


def _keys(config: Config, kind: Checkpoint, architecture: Architecture, layers: Sequence[MoELayer]) -> Keys:
    """The key-values of the architecture. Raises BadFile when they contradict the experts' width."""
    keys: dict[str, Value | None] = {**common_keys(config), **kind.keys(config)}
    width = keys.get(architecture.width_key)
    if width is not None and width != layers[0].n_ff:
        raise BadFile(f"{config.path}: says that experts are {width} wide, but those of layer {layers[0].layer} are "
                      f"{layers[0].n_ff}")
    keys[architecture.width_key] = layers[0].n_ff
    return {key: value for key, value in keys.items() if value is not None}


def _records(architecture: Architecture, keys: Keys, name: str, file_type: int) -> dict[str, bytes]:
    records = {
        "general.architecture": kv_string("general.architecture", architecture.name),
        "general.type": kv_string("general.type", "model"),
        "general.name": kv_string("general.name", name),
        "general.file_type": kv_u32("general.file_type", file_type),
        "general.quantization_version": kv_u32("general.quantization_version", QUANTIZATION_VERSION),
    }
    for suffix, value in keys.items():
        records[architecture.key(suffix)] = _record(architecture.key(suffix), value)
    return records


def _record(key: str, value: Value) -> bytes:
    if isinstance(value, list):
        return encode_kv(key, value, ARRAY, BOOL if isinstance(value[0], bool) else _I32)
    if isinstance(value, bool):
        return encode_kv(key, value, BOOL)
    if isinstance(value, str):
        return encode_kv(key, value, STRING)
    return encode_kv(key, value, _F32 if isinstance(value, float) else U32)
