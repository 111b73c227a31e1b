"""Random Mixture-of-Experts models in GGUF form, small or large, one recipe per llama.cpp architecture.

Knows the tensors and metadata keys each architecture loads (llama.cpp src/models/*.cpp, as of
llama-cpp-python 0.3.36), and a scale for every weight that keeps activations near 1, so that routing differs
between tokens and logits are neither flat nor infinite. The numbers depend only on the seed and the tensor's
name: a seed gives the same weights before quantization for every `expert_type`, and "deepseek2" and
"deepseek2-fused" are the same model.

    write_random_model(path, "qwen3moe")             # 2.5 MB
    write_random_model(path, "olmoe", Shape(n_expert=32, n_used=4), expert_type="Q2_K")
    write_big_model(path, n_layer=8, n_expert=128)   # 2.8 GB
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from random_numbers import RandomTensor, fitting_type, stream_tensors
from random_vocabulary import add_vocabulary, token_likelihood

FloatArray = NDArray[np.float32]
ByteArray = NDArray[np.uint8]

ARCHITECTURES: tuple[str, ...] = (
    "olmoe",
    "qwen3moe",
    "qwen2moe",
    "llama",
    "deepseek2",
    "deepseek2-fused",
    "granitemoe",
    "gpt-oss",
    "smallthinker",
)

@dataclass(frozen=True)
class Shape:
    """Sizes of a random model; the names are llama.cpp's.

    n_ff is the width of one expert. Dense layers are twice as wide, and so is `feed_forward_length` where the
    experts have a key of their own, so that a reader of the wrong key is found out. n_ff_shared is the width
    of the shared expert, by default n_ff in qwen2moe and none in granitemoe; deepseek2 has n_shared * n_ff.
    """

    n_layer: int = 2
    n_embd: int = 256
    n_ff: int = 256
    n_expert: int = 8
    n_used: int = 2
    n_vocab: int = 512
    n_ctx: int = 2048
    head_dim: int = 64
    n_head: int | None = None  # n_embd / head_dim
    n_head_kv: int | None = None  # half of n_head
    n_ff_shared: int | None = None
    n_shared: int = 2  # deepseek2 only
    n_dense: int = 1  # leading dense layers, deepseek2 only
    n_group: int = 0  # expert groups, deepseek2 only; 4 makes groups of n_expert / 4, half of them used
    n_swa: int = 32  # sliding window of gpt-oss, on even layers
    sigmoid: bool = False  # router of smallthinker; else a softmax
    kv_rank: int = 128  # deepseek2 (MLA)
    q_rank: int = 128
    n_rot_mla: int = 32
    n_nope_mla: int = 64

    @property
    def heads(self) -> int:
        return self.n_head or max(1, self.n_embd // self.head_dim)

    @property
    def heads_kv(self) -> int:
        return self.n_head_kv or (self.heads // 2 if self.heads % 2 == 0 else self.heads)


def write_random_model(
    path: str | os.PathLike[str],
    arch: str,
    shape: Shape | None = None,
    expert_type: str | None = None,
    dense_type: str = "Q8_0",
    seed: int = 0,
    down_type: str | None = None,
    vocab: bool = True,
    split: bool = False,
    tile: bool = False,
    scales: Sequence[str] = (),
    router_type: str = "F32",
    tied: bool = False,
) -> Path:
    """Write a random model that stock llama.cpp loads, and return its path (of the first part, if split).

    arch: one of ARCHITECTURES.
    expert_type: ggml type of the experts, by name; default Q4_K, MXFP4 for gpt-oss. down_type: of the down
    projections, default expert_type. dense_type: of the other matrices. Where a row is not a multiple of the
    type's block, Q8_0 takes its place, or F16. Norms and biases are F32, routers of router_type.
    tied: without an output matrix, so that the embedding is the output too.
    vocab: write a byte-level BPE vocabulary (token id = byte below 256, ID_OF_EOS ends a text) and a chat
    template; else the model has a vocabulary size only.
    split: write two files, NAME-00001-of-00002.gguf and NAME-00002-of-00002.gguf.
    scales: "gate", "up", "down": the projections that carry a scale for each expert, as NVFP4 checkpoints do.
    tile: draw few numbers and repeat them in blocks of rows, the blocks in a different order in each expert.
    Raises KeyError for an unknown arch or type, ValueError for n_vocab too small for a vocabulary.
    """
    shape = shape or Shape()
    expert_type = expert_type or ("MXFP4" if arch == "gpt-oss" else "Q4_K")
    recipe = Recipe(arch, shape, expert_type, down_type or expert_type, dense_type, tuple(scales))
    recipe.router_type = router_type
    RECIPES[arch](recipe)
    recipe.embeddings(token_likelihood(shape.n_vocab) if vocab else None)

    if tied:
        recipe.tensors.pop()
    n_first = (len(recipe.tensors) + 1) // 2 if split else 0
    writer = gguf.GGUFWriter(Path(path), recipe.arch, split_max_tensors=n_first)
    _add_metadata(writer, recipe)
    if vocab:
        add_vocabulary(writer, shape.n_vocab)
    else:
        writer.add_tokenizer_model("none")
    for tensor in recipe.tensors:
        dtype = np.dtype(np.float32)  # not read when raw_dtype is given
        writer.add_tensor_info(tensor.name, tensor.dims, dtype, tensor.n_bytes, raw_dtype=tensor.ggml_type)
    names: list[Path] = writer.format_shard_names(Path(path))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    stream_tensors(writer, {tensor.name: tensor for tensor in recipe.tensors}, seed, tile)
    writer.close()
    return names[0]


def write_big_model(
    path: str | os.PathLike[str],
    arch: str = "qwen3moe",
    n_layer: int = 8,
    n_expert: int = 128,
    n_embd: int = 2048,
    n_ff: int = 768,
    n_used: int = 8,
    expert_type: str | None = "Q4_K",
    seed: int = 0,
    n_vocab: int = 4096,
    split: bool = False,
) -> Path:
    """Write a model of any size in under 300 MB of memory, at about the speed of the disk.

    The defaults make 2.8 GB: 8 layers x 128 experts x 2048/768 in Q4_K. No two experts are equal. One matrix
    of one expert must fit in memory (Mixtral's 14336 x 4096 takes 33 MB in Q4_K).
    """
    shape = Shape(n_layer, n_embd, n_ff, n_expert, n_used, n_vocab, head_dim=128 if n_embd % 128 == 0 else 64)
    return write_random_model(path, arch, shape, expert_type, seed=seed, split=split, tile=True)


# ---- what each architecture holds --------------------------------------------------------------------------


class Recipe:
    """Collects the tensors and metadata of one model; the functions in RECIPES fill it."""

    def __init__(
        self, arch: str, shape: Shape, expert_type: str, down_type: str, dense_type: str, scales: tuple[str, ...]
    ) -> None:
        self.arch = arch.removesuffix("-fused")
        self.fused = arch.endswith("-fused")
        self.shape = shape
        self.expert_type = expert_type
        self.down_type = down_type
        self.dense_type = dense_type
        self.scales = scales
        self.router_type = "F32"
        self.tensors: list[RandomTensor] = []
        self.keys: dict[str, Any] = {}
        self.embedding_std = 1.0
        self.output_gain = 4.0
        self.residual_gain = 1.0  # makes up for a scale llama.cpp puts on what a layer adds

    def vector(self, name: str, *dims: int, mean: float = 0.0, std: float = 0.1) -> None:
        self.tensors.append(RandomTensor(name, dims, "F32", std, mean))

    def matrix(self, name: str, n_out: int, n_in: int, gain: float = 1.0, type_name: str = "") -> None:
        """A matrix whose output is `gain` times as large as its input."""
        type_name = fitting_type(type_name or self.dense_type, n_in)
        self.tensors.append(RandomTensor(name, (n_out, n_in), type_name, gain / math.sqrt(n_in)))

    def stack(self, name: str, n: int, n_out: int, n_in: int, type_name: str, gain: float = 1.0) -> None:
        type_name = fitting_type(type_name, n_in)
        self.tensors.append(RandomTensor(name, (n, n_out, n_in), type_name, gain / math.sqrt(n_in)))

    def norm(self, name: str, n: int) -> None:
        self.vector(name, n, mean=1.0)

    def embeddings(self, likelihood: FloatArray | None) -> None:
        s = self.shape
        type_name = fitting_type(self.dense_type, s.n_embd)
        dims = (s.n_vocab, s.n_embd)
        std = self.output_gain / math.sqrt(s.n_embd)
        self.tensors.insert(0, RandomTensor("token_embd.weight", dims, type_name, self.embedding_std))
        self.norm("output_norm.weight", s.n_embd)
        self.tensors.append(RandomTensor("output.weight", dims, type_name, std, row_scale=likelihood))

    def attention(self, blk: str, bias: bool = False, output_bias: bool = False) -> None:
        s = self.shape
        n_q, n_kv = s.heads * s.head_dim, s.heads_kv * s.head_dim
        self.norm(f"{blk}.attn_norm.weight", s.n_embd)
        for part, n_out in (("q", n_q), ("k", n_kv), ("v", n_kv)):
            self.matrix(f"{blk}.attn_{part}.weight", n_out, s.n_embd, gain=1.5)
            if bias:
                self.vector(f"{blk}.attn_{part}.bias", n_out)
        self.matrix(f"{blk}.attn_output.weight", s.n_embd, n_q, gain=self.residual_gain)
        if output_bias:
            self.vector(f"{blk}.attn_output.bias", s.n_embd)

    def ffn(self, blk: str, suffix: str, n_ff: int) -> None:
        """Dense or shared-expert gate, up and down."""
        n_embd = self.shape.n_embd
        self.matrix(f"{blk}.ffn_gate{suffix}.weight", n_ff, n_embd)
        self.matrix(f"{blk}.ffn_up{suffix}.weight", n_ff, n_embd)
        self.matrix(f"{blk}.ffn_down{suffix}.weight", n_embd, n_ff, gain=self.residual_gain)

    def experts(self, blk: str, gain: float = 2.0) -> None:
        """Router and experts; with gain 2 in the down projection they add about what they were given."""
        s = self.shape
        self.matrix(f"{blk}.ffn_gate_inp.weight", s.n_expert, s.n_embd, gain=2.0, type_name=self.router_type)
        self.stack(f"{blk}.ffn_gate_exps.weight", s.n_expert, s.n_ff, s.n_embd, self.expert_type)
        self.stack(f"{blk}.ffn_up_exps.weight", s.n_expert, s.n_ff, s.n_embd, self.expert_type)
        if self.fused:
            up, gate = self.tensors.pop(), self.tensors.pop()
            dims = (s.n_expert, 2 * s.n_ff, s.n_embd)
            name = f"{blk}.ffn_gate_up_exps.weight"
            self.tensors.append(replace(gate, name=name, dims=dims, sources=(gate.name, up.name)))
        down = f"{blk}.ffn_down_exps.weight"
        self.stack(down, s.n_expert, s.n_embd, s.n_ff, self.down_type, gain * self.residual_gain)
        for part in self.scales:
            self.vector(f"{blk}.ffn_{part}_exps.scale", s.n_expert, mean=1.0, std=0.3)


def olmoe(r: Recipe) -> None:
    r.shape = replace(r.shape, n_head_kv=r.shape.heads)  # llama.cpp wants n_embd values in attn_k_norm
    for blk in _blocks(r):
        r.attention(blk)
        r.norm(f"{blk}.attn_q_norm.weight", r.shape.n_embd)
        r.norm(f"{blk}.attn_k_norm.weight", r.shape.n_embd)
        r.norm(f"{blk}.ffn_norm.weight", r.shape.n_embd)
        r.experts(blk, gain=3.0)  # gate weights are not normalized to 1


def qwen3moe(r: Recipe) -> None:
    _experts_have_own_width(r)
    for blk in _blocks(r):
        r.attention(blk)
        r.norm(f"{blk}.attn_q_norm.weight", r.shape.head_dim)
        r.norm(f"{blk}.attn_k_norm.weight", r.shape.head_dim)
        r.norm(f"{blk}.ffn_norm.weight", r.shape.n_embd)
        r.experts(blk)


def qwen2moe(r: Recipe) -> None:
    _experts_have_own_width(r)
    n_ff_shared = r.shape.n_ff if r.shape.n_ff_shared is None else r.shape.n_ff_shared
    r.keys["expert_shared_feed_forward_length"] = n_ff_shared
    for blk in _blocks(r):
        r.attention(blk, bias=True)
        r.norm(f"{blk}.ffn_norm.weight", r.shape.n_embd)
        r.experts(blk, gain=3.0)
        r.vector(f"{blk}.ffn_gate_inp_shexp.weight", r.shape.n_embd, std=1 / math.sqrt(r.shape.n_embd))
        r.ffn(blk, "_shexp", n_ff_shared)


def llama(r: Recipe) -> None:
    for blk in _blocks(r):
        r.attention(blk)
        r.norm(f"{blk}.ffn_norm.weight", r.shape.n_embd)
        r.experts(blk)


def granitemoe(r: Recipe) -> None:
    """Granite scales embeddings, attention, residuals and logits; the weights make up for it."""
    r.keys |= {"embedding_scale": 12.0, "attention.scale": 1.0 / r.shape.head_dim, "residual_scale": 0.22}
    r.keys["logit_scale"] = 6.0
    r.embedding_std /= 12.0
    r.residual_gain /= 0.22
    r.output_gain *= 6.0
    n_ff_shared = r.shape.n_ff_shared or 0
    if n_ff_shared:
        r.keys["expert_shared_feed_forward_length"] = n_ff_shared
    for blk in _blocks(r):
        r.attention(blk)
        r.norm(f"{blk}.ffn_norm.weight", r.shape.n_embd)
        r.experts(blk)
        if n_ff_shared:
            r.ffn(blk, "_shexp", n_ff_shared)


def deepseek2(r: Recipe) -> None:
    """DeepSeek V3: sigmoid router with a selection bias, shared experts, MLA in its absorbed form."""
    s = r.shape
    weights_scale = 2.5
    r.keys |= {
        "feed_forward_length": 2 * s.n_ff,
        "expert_feed_forward_length": s.n_ff,
        "expert_shared_count": s.n_shared,
        "leading_dense_block_count": s.n_dense,
        "expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID),
        "expert_weights_norm": True,
        "expert_weights_scale": weights_scale,
        "attention.head_count_kv": 1,
        "attention.key_length": s.kv_rank + s.n_rot_mla,
        "attention.value_length": s.kv_rank,
        "attention.key_length_mla": s.n_nope_mla + s.n_rot_mla,
        "attention.value_length_mla": s.head_dim,
        "attention.q_lora_rank": s.q_rank,
        "attention.kv_lora_rank": s.kv_rank,
        "rope.dimension_count": s.n_rot_mla,
    }
    if s.n_group:
        r.keys |= {"expert_group_count": s.n_group, "expert_group_used_count": max(1, s.n_group // 2)}
    for layer, blk in enumerate(_blocks(r)):
        _mla_attention(r, blk)
        r.norm(f"{blk}.ffn_norm.weight", s.n_embd)
        if layer < s.n_dense:
            r.ffn(blk, "", 2 * s.n_ff)
            continue
        r.experts(blk, gain=2.0 / weights_scale)
        r.vector(f"{blk}.exp_probs_b.bias", s.n_expert)
        r.ffn(blk, "_shexp", s.n_shared * s.n_ff)


def _mla_attention(r: Recipe, blk: str) -> None:
    s = r.shape
    n_key = s.n_nope_mla + s.n_rot_mla
    r.norm(f"{blk}.attn_norm.weight", s.n_embd)
    if s.n_layer in (26, 27):  # llama.cpp takes these depths for the Lite models, which have no low-rank q
        r.keys.pop("attention.q_lora_rank", None)
        r.matrix(f"{blk}.attn_q.weight", s.heads * n_key, s.n_embd, gain=1.5)
    else:
        r.matrix(f"{blk}.attn_q_a.weight", s.q_rank, s.n_embd)
        r.norm(f"{blk}.attn_q_a_norm.weight", s.q_rank)
        r.matrix(f"{blk}.attn_q_b.weight", s.heads * n_key, s.q_rank, gain=1.5)
    r.matrix(f"{blk}.attn_kv_a_mqa.weight", s.kv_rank + s.n_rot_mla, s.n_embd)
    r.norm(f"{blk}.attn_kv_a_norm.weight", s.kv_rank)
    r.stack(f"{blk}.attn_k_b.weight", s.heads, s.kv_rank, s.n_nope_mla, r.dense_type)
    r.stack(f"{blk}.attn_v_b.weight", s.heads, s.head_dim, s.kv_rank, r.dense_type, gain=1.5)
    r.matrix(f"{blk}.attn_output.weight", s.n_embd, s.heads * s.head_dim)


def gpt_oss(r: Recipe) -> None:
    s = r.shape
    r.keys |= {"expert_feed_forward_length": s.n_ff, "attention.sliding_window": s.n_swa}
    for blk in _blocks(r):
        r.attention(blk, bias=True, output_bias=True)
        r.vector(f"{blk}.attn_sinks.weight", s.heads, std=1.0)
        r.norm(f"{blk}.post_attention_norm.weight", s.n_embd)
        r.experts(blk, gain=1.0)  # swiglu_oai multiplies by up + 1, not by up
        r.vector(f"{blk}.ffn_gate_inp.bias", s.n_expert, std=0.3)
        for part, n_out in (("gate", s.n_ff), ("up", s.n_ff), ("down", s.n_embd)):
            r.vector(f"{blk}.ffn_{part}_exps.bias", s.n_expert, n_out, std=0.3)


def smallthinker(r: Recipe) -> None:
    """Routes before attention: the router sees the residual stream itself."""
    _experts_have_own_width(r)
    gating = gguf.ExpertGatingFuncType.SIGMOID if r.shape.sigmoid else gguf.ExpertGatingFuncType.SOFTMAX
    r.keys["expert_gating_func"] = int(gating)
    for blk in _blocks(r):
        r.attention(blk)
        r.norm(f"{blk}.ffn_norm.weight", r.shape.n_embd)
        r.experts(blk, gain=3.0)  # its activation, REGLU, leaves half of the values


RECIPES = {
    "olmoe": olmoe,
    "qwen3moe": qwen3moe,
    "qwen2moe": qwen2moe,
    "llama": llama,
    "deepseek2": deepseek2,
    "deepseek2-fused": deepseek2,
    "granitemoe": granitemoe,
    "gpt-oss": gpt_oss,
    "smallthinker": smallthinker,
}


def _blocks(r: Recipe) -> Iterator[str]:
    return (f"blk.{layer}" for layer in range(r.shape.n_layer))


def _experts_have_own_width(r: Recipe) -> None:
    r.keys |= {"feed_forward_length": 2 * r.shape.n_ff, "expert_feed_forward_length": r.shape.n_ff}


# ---- metadata and vocabulary -------------------------------------------------------------------------------


def _add_metadata(writer: gguf.GGUFWriter, r: Recipe) -> None:
    s = r.shape
    writer.add_name(f"random {r.arch}")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    keys: dict[str, Any] = {
        "block_count": s.n_layer,
        "context_length": s.n_ctx,
        "embedding_length": s.n_embd,
        "feed_forward_length": s.n_ff,
        "vocab_size": s.n_vocab,
        "expert_count": s.n_expert,
        "expert_used_count": s.n_used,
        "attention.head_count": s.heads,
        "attention.head_count_kv": s.heads_kv,
        "attention.key_length": s.head_dim,
        "attention.value_length": s.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": s.head_dim,
        "rope.freq_base": 10000.0,
        **r.keys,
    }
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(f"{r.arch}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{r.arch}.{key}", value)
        else:
            writer.add_float32(f"{r.arch}.{key}", value)
