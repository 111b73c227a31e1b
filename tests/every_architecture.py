"""A tiny random model of every llama.cpp architecture with experts, one row of metadata each.

llama.cpp itself says which tensors an architecture has and how large they are: it makes a model from metadata alone
(`llama_model_init_from_user`), and what it asks to be filled is what the file gets. So a row holds only the keys in
which an architecture differs, as of llama-cpp-python 0.3.36; a key that an architecture does not read does no harm.

    write_tiny_model(path, "step35")
"""

from __future__ import annotations

import ctypes
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from random_numbers import quantize
from random_vocabulary import add_vocabulary

N_VOCAB = 320
N_LAYER = 2
N_EMBD = 64
N_HEAD = 2
N_FF = 96  # of dense layers
N_FF_EXP = 32
N_FF_SHARED = 64
N_EXPERT = 6
N_USED = 2

COMMON: Mapping[str, Any] = {
    "vocab_size": N_VOCAB,
    "context_length": 256,
    "embedding_length": N_EMBD,
    "block_count": N_LAYER,
    "leading_dense_block_count": 1,
    "feed_forward_length": N_FF,
    "attention.head_count": N_HEAD,
    "attention.head_count_kv": N_HEAD,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.clamp_kqv": 8.0,
    "attention.sliding_window": 32,
    "attention.sliding_window_pattern": 2,
    "attention.indexer.head_count": 4,
    "attention.indexer.key_length": 32,
    "attention.indexer.top_k": 4096,
    "attention.indexer.block_size": 4,
    "attention.indexer.kpool": 4,
    "attention.indexer.local_blocks": 1,
    "full_attention_interval": 2,
    "rope.dimension_sections": [8, 8, 8, 8],
    "expert_count": N_EXPERT,
    "expert_used_count": N_USED,
    "expert_shared_count": 1,
    "expert_feed_forward_length": N_FF_EXP,
    "expert_shared_feed_forward_length": N_FF_SHARED,
    "expert_gating_func": 2,
    "expert_group_scale": 1.0,
    "expert_latent_length": 32,
    "experts_per_group": 1,
    "interleave_moe_layer_step": 1,
    "moe_every_n_layers": 1,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 2 * N_EMBD,
    "ssm.state_size": 32,
    "ssm.time_step_rank": N_HEAD,
    "ssm.group_count": 2,
    "shortconv.l_cache": 3,
}
MLA: Mapping[str, Any] = {
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 32,
    "attention.key_length": 48,  # kv_lora_rank + rope.dimension_count
    "attention.value_length": 32,
    "attention.key_length_mla": 40,
    "attention.value_length_mla": 24,
    "rope.dimension_count": 16,
}
KDA: Mapping[str, Any] = {
    "attention.head_count_kv": [1, 0],
    "kda.head_dim": 32,
    "kda.safe_gate": True,
    "kda.gate_lower_bound": -5.0,
}
EVERY_OTHER: Mapping[str, Any] = {"attention.head_count": [N_HEAD, 0], "attention.head_count_kv": [N_HEAD, 0]}
HYPER: Mapping[str, Any] = {
    "hyper_connection.count": 4,
    "hyper_connection.sinkhorn_iterations": 2,
    "hyper_connection.epsilon": 1e-6,
    "hyper_connection.low_rank": 8,
    "hyper_connection.magnitude": 2.0,
}


@dataclass(frozen=True)
class Row:
    """keys: without the architecture's prefix; None leaves a common key away. drop: tensors that llama.cpp offers and
    the file does not get, as a regular expression."""

    keys: Mapping[str, Any] = field(default_factory=dict)
    drop: str = ""


PLAIN = (
    "olmoe qwen2moe qwen3moe phimoe llama granitemoe hunyuan-moe minimax-m2 glm4moe dots1 ernie4_5-moe gpt-oss afmoe "
    "bailingmoe bailingmoe2 deepseek deepseek2-ocr laguna exaone-moe cohere2moe grok grovemoe mellum qwen3vlmoe "
    "smallthinker dbrx granite mistral3 minimax-m3 hy_v3 minimax-01"
)
PATTERN: Mapping[str, Any] = {"attention.sliding_window_pattern": [0, 1]}
ROWS: Mapping[str, Row] = {
    **{name: Row() for name in PLAIN.split()},
    "maple": Row({**PATTERN, "swiglu_clamp_exp": [7.0, 7.0], "swiglu_clamp_shexp": [7.0, 7.0]}),
    **{name: Row(PATTERN) for name in ("mimo2", "step35", "granite_swa")},
    **{name: Row({"ssm.state_size": 64}) for name in ("qwen3next", "qwen35moe")},
    "gemma4": Row({"attention.sliding_window_pattern": [1, 0], "embedding_length_per_layer_input": 16,
                   "attention.key_length_swa": 32, "attention.value_length_swa": 32}),
    # attention, experts, a recurrent layer: one thing a layer
    "nemotron_h_moe": Row({"block_count": 3, "attention.head_count_kv": [N_HEAD, 0, 0],
                           "feed_forward_length": [0, N_FF, 0], "leading_dense_block_count": None,
                           "expert_latent_length": None}),
    "lfm2moe": Row(EVERY_OTHER),
    "granitehybrid": Row(EVERY_OTHER),
    **{name: Row(MLA) for name in ("deepseek2", "mistral4")},
    **{name: Row({**MLA, "attention.indexer.key_length": 64}) for name in ("deepseek32", "glm-dsa")},
    "kimi-linear": Row({**MLA, **EVERY_OTHER, **KDA}),
    "bailingmoe3": Row({**MLA, **EVERY_OTHER, **KDA, "rope.dimension_sections": None}),
    "kimi-k3": Row({**MLA, **EVERY_OTHER, **KDA, "attn_res.block_size": 2, "activation.situ_beta": 1.0,
                    "activation.situ_linear_beta": 1.0}),
    "glm5-next": Row({**MLA, **KDA, **HYPER, "rope.dimension_count": 0, "attention.key_length": 32,
                      "attention.key_length_mla": 24}),
    "hy_v4": Row({**MLA, **HYPER, "attention.indexer.types": [1, 1]}),
    "qwen4exp": Row({**HYPER, "ssm.state_size": 64}),
}


class Tensor(ctypes.Structure):
    """The head of ggml_tensor."""

    _fields_ = (
        ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
    )  # fmt: skip


def ggml_base() -> ctypes.CDLL:
    if sys.platform == "linux":
        return ctypes.CDLL("libggml-base.so.0")  # by SONAME: the one that llama_cpp has loaded
    folder = Path(llama_cpp.__file__).parent / "lib"
    return ctypes.CDLL(str(next(p for p in sorted(folder.iterdir()) if p.name.startswith("libggml-base."))))


def keys_of(arch: str, row: Row) -> dict[str, Any]:
    return {key: value for key, value in {**COMMON, **row.keys}.items() if value is not None}


def _writer(path: Path, arch: str, keys: Mapping[str, Any]) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        name = f"{arch}.{key}"
        first = value[0] if isinstance(value, list) else value
        if isinstance(value, list):
            kind = gguf.GGUFValueType.FLOAT32 if isinstance(first, float) else gguf.GGUFValueType.UINT32
            writer.add_key_value(name, value, gguf.GGUFValueType.ARRAY, kind)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_float32(name, value)
    add_vocabulary(writer, N_VOCAB)
    return writer


def tensors_of(arch: str, keys: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape in ggml order of every tensor, optional ones too, that llama.cpp gives a model of these keys."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys.gguf"
        writer = _writer(path, arch, keys)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return _ask(path, arch)


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def _ask(path: Path, arch: str) -> dict[str, tuple[int, ...]]:
    base = ggml_base()
    base.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
    base.gguf_init_from_file.restype = ctypes.c_void_p
    base.gguf_free.argtypes = [ctypes.c_void_p]
    base.ggml_get_name.argtypes = [ctypes.c_void_p]
    base.ggml_get_name.restype = ctypes.c_char_p
    found: dict[str, tuple[int, ...]] = {}

    def note(tensor: int, _: object) -> None:
        ne = list(ctypes.cast(tensor, ctypes.POINTER(Tensor))[0].ne)
        while len(ne) > 1 and ne[-1] == 1:
            ne.pop()
        found[base.ggml_get_name(tensor).decode()] = tuple(ne)

    llama_cpp.llama_backend_init()
    metadata = base.gguf_init_from_file(str(path).encode(), _InitParams(True, None))
    callback = llama_cpp.llama_cpp.llama_model_set_tensor_data_t(note)
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.load_mtp = True
    model = llama_cpp.llama_model_init_from_user(metadata, callback, None, params)
    base.gguf_free(metadata)
    if not model:
        raise RuntimeError(f"llama.cpp makes no {arch} of these keys")
    llama_cpp.llama_model_free(model)
    return found


def write_tiny_model(
    path: Path, arch: str, row: Row | None = None, expert_type: str = "Q8_0", seed: int = 0, scales: bool = False
) -> Path:
    """Write the random model of `arch` and return its path. scales: keep the optional scale of each expert."""
    row = row or ROWS[arch]
    keys = keys_of(arch, row)
    drop = re.compile(rf"{row.drop or '(?!)'}|input_scale$|{'(?<!_exps)' if scales else ''}(?<!gate_inp)\.scale$")
    writer = _writer(path, arch, keys)
    rng = np.random.default_rng(seed)
    for name, shape in tensors_of(arch, keys).items():
        if drop.search(name):
            continue
        values = _values(name, shape, rng)
        if "_exps.weight" in name:
            kind = gguf.GGMLQuantizationType[expert_type]
            rows = values.reshape(-1, shape[0])
            writer.add_tensor(name, quantize(rows, expert_type).reshape(*shape[:0:-1], -1), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _values(name: str, shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Numbers that keep activations near 1, in numpy's order of dimensions."""
    values = rng.standard_normal(shape[::-1], dtype=np.float32)
    if "ssm_a" in name:
        return -np.abs(values)  # how fast a state decays
    if "norm" in name or "rope_f" in name or name.endswith(".scale"):
        return 1 + 0.1 * values
    if len(shape) == 1:
        return 0.1 * values
    return values if name == "token_embd.weight" else values * np.float32(1.5 / np.sqrt(shape[0]))
