"""Conversions end to end: what is written, what it is read back as, and that a failure leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from moe_edge.convert import write
from moe_edge.convert.convert import convert
from moe_edge.convert.experts import MoELayer
from moe_edge.convert.ggml_types import BY_NAME, type_name
from moe_edge.convert.gguf import open_gguf, read_gguf
from moe_edge.convert.plan import make_plan, may_quantize
from moe_edge.convert.quantize import TARGETS, dequantize, fitting_type, quantize, requantize, target_type
from moe_edge.convert.skeleton import skeleton_for
from moe_edge.convert.source import open_source
from moe_edge.convert.store import ExpertModel, open_model
from moe_edge.models.architectures import ARCHITECTURES, find_architecture, stub_overrides
from moe_edge.models.errors import (
    BadChecksum,
    BadFile,
    BadMagic,
    CutFile,
    DiskFull,
    MissingFile,
    MoeEdgeError,
    NotMoE,
    UnknownName,
    UsageError,
    WrongStore,
)
from test_safetensors import to_bf16, write_safetensors
from test_tokenizer import train, write_tokenizer

N_LAYER, N_EXPERT, N_EMBD, N_FF, N_HEAD = 2, 4, 256, 512, 4
RNG = np.random.default_rng(7)


def floats(*shape: int) -> np.ndarray:
    """Values bfloat16 holds exactly."""
    bits = to_bf16(RNG.standard_normal(shape).astype(np.float32) * 0.1).astype(np.uint32) << 16
    return bits.view(np.float32)


def olmoe_config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["OlmoeForCausalLM"], "hidden_size": N_EMBD, "intermediate_size": N_FF,
        "num_hidden_layers": N_LAYER, "num_attention_heads": N_HEAD, "num_key_value_heads": N_HEAD,
        "num_experts": N_EXPERT, "num_experts_per_tok": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "norm_topk_prob": False, "tie_word_embeddings": False,
        "clip_qkv": None, "rope_scaling": None, "attention_bias": False,
    } | changes  # fmt: skip


def qwen3_config(**changes: Any) -> dict[str, Any]:
    keys = {
        "architectures": ["Qwen3MoeForCausalLM"], "intermediate_size": 1024, "moe_intermediate_size": N_FF,
        "norm_topk_prob": True, "head_dim": 32, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False,
    }  # fmt: skip
    return olmoe_config(**keys) | changes


def checkpoint_tensors(config: dict[str, Any], n_vocab: int, fused: bool = False) -> dict[str, np.ndarray]:
    head = config.get("head_dim", N_EMBD // N_HEAD)
    n_q, n_kv = head * N_HEAD, head * config["num_key_value_heads"]
    norms = (head, head) if "head_dim" in config else (n_q, n_kv)
    tensors = {"model.embed_tokens.weight": floats(n_vocab, N_EMBD), "model.norm.weight": floats(N_EMBD)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = floats(n_vocab, N_EMBD)
    for layer in range(N_LAYER):
        p = f"model.layers.{layer}."
        shapes = {
            "input_layernorm": (N_EMBD,), "post_attention_layernorm": (N_EMBD,), "mlp.gate": (N_EXPERT, N_EMBD),
            "self_attn.q_proj": (n_q, N_EMBD), "self_attn.k_proj": (n_kv, N_EMBD), "self_attn.v_proj": (n_kv, N_EMBD),
            "self_attn.o_proj": (N_EMBD, n_q), "self_attn.q_norm": norms[:1], "self_attn.k_norm": norms[1:],
        }  # fmt: skip
        tensors |= {f"{p}{name}.weight": floats(*shape) for name, shape in shapes.items()}
        up, gate, down = (floats(N_EXPERT, *shape) for shape in ((N_FF, N_EMBD), (N_FF, N_EMBD), (N_EMBD, N_FF)))
        if fused:
            tensors[f"{p}mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
            tensors[f"{p}mlp.experts.down_proj"] = down
            continue
        for expert in range(N_EXPERT):
            for name, stack in (("up", up), ("gate", gate), ("down", down)):
                tensors[f"{p}mlp.experts.{expert}.{name}_proj.weight"] = stack[expert]
    return tensors


def write_checkpoint(folder: Path, config: dict[str, Any] | None = None, fused: bool = False) -> Path:
    """A random Hugging Face folder in bfloat16."""
    folder.mkdir()
    config = config or olmoe_config()
    reference = train("gpt-2")
    write_tokenizer(folder, reference)
    config.setdefault("vocab_size", reference.get_vocab_size() + 3)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = checkpoint_tensors(config, config["vocab_size"], fused)
    write_safetensors(folder / "model.safetensors", {n: ("BF16", to_bf16(a)) for n, a in tensors.items()})
    return folder


def write_stock(
    path: Path, architecture: str = "olmoe", kind: str = "F32", kv: dict[str, int] | None = None, bias: bool = False
) -> Path:
    """A GGUF with stacked experts of one type and two dense tensors; enough for us, not for llama.cpp."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("general.name", "random")
    widths = {"feed_forward_length": N_FF, "expert_feed_forward_length": N_FF, "expert_used_count": 2}
    for key, value in (widths | (kv or {})).items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_tensor("token_embd.weight", floats(64, N_EMBD))
    for layer in range(N_LAYER):
        writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", floats(N_EXPERT, N_EMBD))
        for name, shape in (("gate", (N_FF, N_EMBD)), ("up", (N_FF, N_EMBD)), ("down", (N_EMBD, N_FF))):
            rows = floats(N_EXPERT * shape[0], shape[1])
            data = np.frombuffer(quantize(rows, BY_NAME[kind].id), np.uint8).reshape(N_EXPERT, shape[0], -1)
            writer.add_tensor(f"blk.{layer}.ffn_{name}_exps.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
            if bias:
                writer.add_tensor(f"blk.{layer}.ffn_{name}_exps.bias", floats(N_EXPERT, shape[0]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def piece_bytes(model: ExpertModel, index: int) -> bytes:
    piece = model.pieces[index]
    return model.files[piece.file].read_bytes()[piece.offset : piece.offset + piece.nbytes]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("olmoe") / "tiny-olmoe")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stock(tmp_path_factory.mktemp("stock") / "stock.gguf", kind="Q8_0")


# -- types and quantizing


@pytest.mark.parametrize("name", TARGETS)
def test_quantized_rows_read_as_gguf_reads_them(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    data = quantize(floats(3, 512), kind)
    ours = dequantize(data, kind, 512)
    raw = np.frombuffer(data, {"F32": np.float32, "F16": np.float16}.get(name, np.uint8)).reshape(3, -1)
    assert np.array_equal(ours, gguf.dequantize(raw, kind).reshape(3, 512))


def test_bfloat16_is_exact_both_ways() -> None:
    rows = floats(4, 64)
    assert np.array_equal(dequantize(quantize(rows, 30), 30, 64), rows)
    ties = np.array([[1.00390625, 1.01171875, -1.00390625, np.inf]], np.float32)  # halfway: to the even neighbour
    assert dequantize(quantize(ties, 30), 30, 4).tolist() == [[1.0, 1.015625, -1.0, np.inf]]


def test_only_one_copy_of_ggml_is_loaded() -> None:
    quantize(floats(1, 256), BY_NAME["Q4_K"].id)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "libggml-base" in line}
    assert len(loaded) == 1


@pytest.mark.parametrize(
    ("name", "cols", "fitting"),
    [
        ("Q4_K", 512, "Q4_K"), ("Q4_K", 96, "Q5_0"), ("Q5_K", 96, "Q5_1"), ("Q6_K", 96, "Q8_0"), ("Q2_K", 96, "Q4_0"),
        ("Q3_K", 96, "Q4_0"), ("IQ4_XS", 96, "IQ4_NL"), ("Q4_K", 100, "F16"), ("Q8_0", 100, "F16"), ("F32", 7, "F32"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fill_blocks_fall_back(name: str, cols: int, fitting: str) -> None:
    assert type_name(fitting_type(BY_NAME[name].id, cols)) == fitting


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("IQ2_XXS", "IQ2_XXS needs an importance matrix"),
        ("IQ1_S", "IQ1_S needs an importance matrix"),
        ("Q4_K_M", "did you mean 'Q4_K'"),
        ("Q4K", "did you mean 'Q4_K'"),
        ("Q8_K", "cannot quantize to Q8_K"),
    ],
)
def test_impossible_types_are_refused_by_name(name: str, says: str) -> None:
    with pytest.raises(UnknownName, match=says):
        target_type(name)


def test_values_a_type_cannot_store_are_refused() -> None:
    with pytest.raises(BadFile, match="'x' holds NaN"):
        requantize(np.full((1, 256), np.nan, np.float32).tobytes(), 0, 12, 256, "tensor 'x'")
    with pytest.raises(BadFile, match="holds 1e\\+06, and F16 stores at most 65504"):
        requantize(np.full((1, 256), 1e6, np.float32).tobytes(), 0, 1, 256, "tensor 'x'")


# -- architectures


def test_width_key_becomes_one_and_lists_keep_their_length() -> None:
    assert stub_overrides(ARCHITECTURES["olmoe"], {}, {0: 64}, None) == {"olmoe.feed_forward_length": 1}
    kv = {"qwen3moe.expert_feed_forward_length": [64, 64, 64]}
    assert stub_overrides(ARCHITECTURES["qwen3moe"], kv, {0: 64}, None) == {
        "qwen3moe.expert_feed_forward_length": [1, 1, 1]
    }


def test_shared_expert_keeps_its_width() -> None:
    deepseek = stub_overrides(ARCHITECTURES["deepseek2"], {"deepseek2.expert_shared_count": 2}, {1: 64, 2: 64}, 128)
    assert deepseek == {"deepseek2.expert_feed_forward_length": 1, "deepseek2.expert_shared_count": 128}
    hunyuan = stub_overrides(ARCHITECTURES["hunyuan-moe"], {}, {0: 64}, 96)
    assert hunyuan == {"hunyuan-moe.feed_forward_length": 1, "hunyuan-moe.expert_shared_feed_forward_length": 96}
    bailing = ARCHITECTURES["bailingmoe2"]
    kv = {"bailingmoe2.expert_shared_count": 2, "bailingmoe2.expert_shared_feed_forward_length": 80}
    assert stub_overrides(bailing, kv, {0: 64}, 160) == {"bailingmoe2.expert_feed_forward_length": 1}
    assert stub_overrides(bailing, {"bailingmoe2.expert_shared_count": 2}, {0: 64}, 128) == {
        "bailingmoe2.expert_feed_forward_length": 1, "bailingmoe2.expert_shared_count": 128
    }  # fmt: skip


def test_shared_width_that_no_key_can_say_is_refused() -> None:
    with pytest.raises(BadFile, match=r"differs between layers \(\[64, 96\]\)"):
        stub_overrides(ARCHITECTURES["glm4moe"], {"glm4moe.expert_shared_count": 1}, {0: 64, 1: 96}, 64)


def test_unknown_and_refused_architectures_are_named() -> None:
    with pytest.raises(UnknownName, match=r"m\.gguf: unknown architecture 'qwen3mo'; did you mean 'qwen3moe'"):
        find_architecture("qwen3mo", "m.gguf")
    with pytest.raises(UnknownName, match="'llama4' is not supported: its shared expert"):
        find_architecture("llama4", "m.gguf")
    with pytest.raises(UnknownName, match="'jamba' is not supported: its dense layers"):
        find_architecture("jamba", "m.gguf")


# -- conversions


def test_checkpoint_becomes_a_pair_with_the_bytes_of_its_experts(checkpoint: Path, tmp_path: Path) -> None:
    report = convert(checkpoint, tmp_path / "olmo.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["olmo.experts.gguf", "olmo.gguf"]
    model = open_model(tmp_path / "olmo.gguf", verify=True)
    layers = [MoELayer(n, N_EXPERT, N_EMBD, N_FF, False, True, ("up", "gate", "down")) for n in range(N_LAYER)]
    assert list(model.layers) == layers
    assert (model.architecture, model.n_expert_used, model.levels) == ("olmoe", 2, ("high",))
    assert model.store_id == report.store_id and len(model.store_id) == 32
    assert model.checksums is not None and len(model.checksums) == len(model.pieces) == N_LAYER * N_EXPERT * 3
    assert model.expert_bytes == N_LAYER * N_EXPERT * 3 * N_EMBD * N_FF * 2
    source = open_source(checkpoint)
    index = 0
    for layer in layers:
        for expert in range(N_EXPERT):
            for projection in layer.projections:
                entry = source.experts[layer.layer, expert, projection]
                piece = model.pieces[index]
                assert piece.name == f"blk.{layer.layer}.ffn_{projection}_exps.{expert}.weight"
                assert (piece.cols, piece.rows) == entry.shape and piece.offset % 4096 == 0
                data = entry.path.read_bytes()[entry.offset : entry.offset + entry.nbytes]
                assert piece_bytes(model, index) == data
                index += 1


def test_gguf_reader_accepts_both_files_and_finds_the_keys_of_the_format(checkpoint: Path, tmp_path: Path) -> None:
    report = convert(checkpoint, tmp_path / "olmo.gguf", type="Q4_K")
    assert report.skeleton is not None and report.store is not None
    skeleton, store = gguf.GGUFReader(report.skeleton), gguf.GGUFReader(report.store)
    own = {key: field.contents() for key, field in skeleton.fields.items() if key.startswith("moe_edge.")}
    assert own == {
        "moe_edge.format_version": 1, "moe_edge.kind": "skeleton", "moe_edge.store_id": report.store_id,
        "moe_edge.in_place": False, "moe_edge.source": "tiny-olmoe",
    }  # fmt: skip
    keys = {key: field.contents() for key, field in store.fields.items() if not key.startswith("GGUF.")}
    assert keys.pop("moe_edge.checksums") is not None and len(keys.pop("moe_edge.source_sha256")) == 64
    assert keys == {
        "general.architecture": "olmoe", "general.alignment": 4096, "moe_edge.format_version": 1,
        "moe_edge.kind": "experts", "moe_edge.store_id": report.store_id, "moe_edge.levels": ["high"],
        "moe_edge.source": "tiny-olmoe",
    }  # fmt: skip
    assert all(tensor.tensor_type == gguf.GGMLQuantizationType.Q4_K for tensor in store.tensors)
    dump = [sys.executable, "-m", "gguf.scripts.gguf_dump", "--no-tensors", str(report.store)]
    assert "moe_edge.store_id" in subprocess.run(dump, capture_output=True, text=True, check=True).stdout


def test_metadata_is_what_llama_cpp_reads(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny-qwen3", qwen3_config())
    kv = open_source(folder).kv
    expected = {
        "block_count": 2, "context_length": 512, "embedding_length": N_EMBD, "feed_forward_length": 1024,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32,
        "attention.value_length": 32, "rope.freq_base": 1e6, "expert_count": N_EXPERT, "expert_used_count": 2,
        "expert_feed_forward_length": N_FF,
    }  # fmt: skip
    for key, value in expected.items():
        assert kv[f"qwen3moe.{key}"] == value, key
    assert kv["qwen3moe.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert (kv["general.architecture"], kv["general.name"], kv["general.file_type"]) == ("qwen3moe", "tiny-qwen3", 32)


@pytest.mark.parametrize(
    ("config", "fused"),
    [
        (olmoe_config(), False),
        (olmoe_config(tie_word_embeddings=True), False),
        (qwen3_config(), True),
        (qwen3_config(tie_word_embeddings=True), False),
    ],
    ids=["olmoe", "olmoe-tied", "qwen3moe-fused", "qwen3moe-tied"],
)
def test_skeleton_loads_in_llama_cpp_and_is_nan_without_the_engine(
    tmp_path: Path, config: dict[str, Any], fused: bool
) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", dict(config), fused)
    convert(folder, tmp_path / "m.gguf", type="Q4_K")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=32, logits_all=True, verbose=False)
    llama.eval([1, 2, 3])
    assert np.isnan(llama.scores[:3]).all()


def test_fused_checkpoint_gives_the_same_store_as_a_split_one(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "fused", qwen3_config(), fused=True)
    convert(folder, tmp_path / "fused.gguf")
    tensors = open_source(folder)
    whole = np.frombuffer((folder / "model.safetensors").read_bytes(), np.uint8)
    entry = tensors.experts[1, 2, "gate"]
    model = open_model(tmp_path / "fused.gguf")
    names = [piece.name for piece in model.pieces]
    gate = piece_bytes(model, names.index("blk.1.ffn_gate_exps.2.weight"))
    up = piece_bytes(model, names.index("blk.1.ffn_up_exps.2.weight"))
    at, nbytes = entry.offset, entry.nbytes
    assert whole[at : at + nbytes].tobytes() == gate and whole[at + nbytes : at + 2 * nbytes].tobytes() == up


def test_default_types_keep_weights_and_widen_norms_and_router(checkpoint: Path) -> None:
    plan = make_plan(open_source(checkpoint))
    types = {each.name: type_name(each.type) for each in plan.dense}
    assert types["blk.0.attn_norm.weight"] == types["blk.0.ffn_gate_inp.weight"] == "F32"
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == "BF16"
    assert {type_name(each.type) for each in plan.experts} == {"BF16"} and not plan.fallbacks
    quantized = make_plan(open_source(checkpoint), "Q4_K")
    types = {each.name: type_name(each.type) for each in quantized.dense}
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.attn_norm.weight"] == types["blk.0.ffn_gate_inp.weight"] == "F32"
    assert type_name(make_plan(open_source(checkpoint), "F16").dense_type) == "BF16"


def test_plan_is_printable_and_json_and_counts_fallbacks(tmp_path: Path) -> None:
    path = write_stock(tmp_path / "m.gguf")
    entry = open_source(path)
    plan = make_plan(entry, "Q4_K", "Q6_K", low_type="Q2_K")
    assert plan.levels == ("high", "low") and not plan.fallbacks
    assert plan.store_bytes == sum(-(-each.nbytes // 4096) * 4096 for each in plan.store_tensors)
    text, data = plan.text(), plan.to_json()
    assert "F32 -> Q4_K" in text and "ffn_up_exps.low" in text and "12 stubs"[1:] in text
    assert json.loads(json.dumps(data)) == data
    assert data["experts"][0] == {
        "name": "blk.0.ffn_up_exps.0.weight", "shape": [N_EMBD, N_FF], "source_type": "F32", "type": "Q4_K",
        "bytes": N_EMBD * N_FF // 256 * 144,
    }  # fmt: skip


def test_fallback_is_counted_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "N_FF", 96)
    plan = make_plan(open_source(write_stock(tmp_path / "m.gguf")), "Q4_K")
    assert plan.fallbacks == {"Q4_K -> Q5_0": N_LAYER * N_EXPERT}
    assert "fallback: 8 x Q4_K -> Q5_0" in plan.text()
    convert(tmp_path / "m.gguf", tmp_path / "out.gguf", type="Q4_K")
    assert {type_name(piece.type) for piece in open_model(tmp_path / "out.gguf").pieces} == {"Q4_K", "Q5_0"}


def test_quantized_experts_are_those_of_ggml(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "m.gguf", type="Q4_K", low_type="Q2_K", threads=3)
    model = open_model(tmp_path / "m.gguf", verify=True)
    assert model.levels == ("high", "low")
    source = open_source(checkpoint)
    entry = source.experts[1, 3, "down"]
    rows = dequantize(entry.path.read_bytes()[entry.offset : entry.offset + entry.nbytes], 30, N_FF)
    names = [piece.name for piece in model.pieces]
    high, low = names.index("blk.1.ffn_down_exps.3.weight"), names.index("blk.1.ffn_down_exps.3.low.weight")
    assert low == high + 3  # an expert's bytes at one level are one run
    assert piece_bytes(model, high) == quantize(rows, BY_NAME["Q4_K"].id)
    assert piece_bytes(model, low) == quantize(rows, BY_NAME["Q2_K"].id)


def test_number_of_threads_does_not_change_a_byte(checkpoint: Path, tmp_path: Path) -> None:
    ids = {convert(checkpoint, tmp_path / f"{n}.gguf", type="Q4_0", threads=n).store_id for n in (1, 2, 5)}
    assert len(ids) == 1
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "5.gguf").read_bytes()


def test_gguf_experts_are_copied_unchanged_and_dense_stays(stock: Path, tmp_path: Path) -> None:
    convert(stock, tmp_path / "m.gguf")
    model, source = open_model(tmp_path / "m.gguf"), open_gguf(stock)
    names = [piece.name for piece in model.pieces]
    stacked = source.tensors["blk.1.ffn_gate_exps.weight"]
    data = stock.read_bytes()[stacked.offset : stacked.offset + stacked.nbytes]
    pieces = [piece_bytes(model, names.index(f"blk.1.ffn_gate_exps.{expert}.weight")) for expert in range(N_EXPERT)]
    assert b"".join(pieces) == data
    skeleton = read_gguf(model.skeleton)
    for name in ("token_embd.weight", "blk.0.ffn_gate_inp.weight"):
        ours, theirs = skeleton.tensors[name], source.tensors[name]
        assert (ours.shape, ours.type) == (theirs.shape, theirs.type)
        assert (
            model.skeleton.read_bytes()[ours.offset : ours.offset + ours.nbytes]
            == stock.read_bytes()[theirs.offset : theirs.offset + theirs.nbytes]
        )
    for key in source.kv:
        if key != "olmoe.feed_forward_length":
            assert skeleton.kv.record(key) == source.kv.record(key)
    assert skeleton.kv["olmoe.feed_forward_length"] == 1
    stub = skeleton.tensors["blk.1.ffn_down_exps.weight"]
    assert stub.shape == (1, N_EMBD, N_EXPERT)
    assert model.skeleton.read_bytes()[stub.offset : stub.offset + stub.nbytes] == b"\xff" * stub.nbytes


def test_quantized_gguf_is_requantized_when_asked(stock: Path, tmp_path: Path) -> None:
    convert(stock, tmp_path / "m.gguf", type="Q4_K", dense_type="Q8_0")
    model, stacked = open_model(tmp_path / "m.gguf"), open_gguf(stock).tensors["blk.0.ffn_up_exps.weight"]
    first = stock.read_bytes()[stacked.offset : stacked.offset + stacked.nbytes // N_EXPERT]
    assert piece_bytes(model, 0) == quantize(dequantize(first, BY_NAME["Q8_0"].id, N_EMBD), BY_NAME["Q4_K"].id)
    types = {name: type_name(entry.type) for name, entry in read_gguf(model.skeleton).tensors.items()}
    assert types["token_embd.weight"] == "Q8_0" and types["blk.0.ffn_gate_inp.weight"] == "F32"


def test_biases_sized_by_the_width_go_to_the_store(tmp_path: Path) -> None:
    path = write_stock(tmp_path / "oss.gguf", "gpt-oss", "MXFP4", bias=True)
    convert(path, tmp_path / "m.gguf")
    in_place, pair = open_model(path, tmp_path / "cache"), open_model(tmp_path / "m.gguf", verify=True)
    for model in (in_place, pair):
        assert set(model.biases) == {(layer, name) for layer in range(N_LAYER) for name in ("up", "gate")}
        bias = model.biases[1, "gate"]
        assert (bias.cols, bias.rows, bias.type, bias.nbytes) == (N_FF, N_EXPERT, 0, N_FF * N_EXPERT * 4)
        tensors = read_gguf(model.skeleton).tensors
        assert tensors["blk.0.ffn_up_exps.bias"].shape == (1, N_EXPERT)
        assert tensors["blk.0.ffn_down_exps.bias"].shape == (N_EMBD, N_EXPERT)
        assert model.pieces[0].type == 39 and model.pieces[0].nbytes == N_EMBD * N_FF // 32 * 17
    assert piece_bytes(in_place, 5) == piece_bytes(pair, 5)


def test_dry_run_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    report = convert(checkpoint, None, type="Q4_K", dry_run=True)
    assert report.skeleton is None and report.plan.store_bytes > 0 and "Q4_K" in report.text()
    convert(checkpoint, tmp_path / "m.gguf", dry_run=True)
    assert not list(tmp_path.iterdir())


def test_progress_reaches_the_total(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert(checkpoint, tmp_path / "m.gguf", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] and seen == sorted(seen)


# -- refusals


def test_model_without_experts_is_not_moe(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "dense.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", floats(8, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(NotMoE, match=r"dense\.gguf: has no expert tensors"):
        convert(tmp_path / "dense.gguf", tmp_path / "m.gguf")
    with pytest.raises(NotMoE):
        open_model(tmp_path / "dense.gguf", tmp_path)


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    path = write_stock(tmp_path / "m.gguf", "jamba")
    with pytest.raises(UnknownName, match="'jamba' is not supported"):
        convert(path, tmp_path / "out.gguf")
    with pytest.raises(UnknownName):
        open_model(path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "class 'LlamaForCausalLM'"),
        ({"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ({"norm_topk_prob": True}, "norm_topk_prob = True"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling = {'type': 'yarn'}"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized with 'fp8'"),
        ({**qwen3_config(), "norm_topk_prob": False}, "norm_topk_prob = False"),
        ({**qwen3_config(), "mlp_only_layers": [0]}, "mlp_only_layers"),
    ],
)
def test_setting_llama_cpp_does_not_follow_is_refused(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownName) as caught:
        open_source(folder)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but 2 layers have experts"),
        ({"num_experts": 8}, "layer 0 has 4 experts"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5"),
        ({"vocab_size": 5000}, "rows for 5000 tokens"),
        ({"architectures": []}, "expected one"),
    ],
)
def test_config_that_contradicts_the_tensors_is_refused(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadFile) as caught:
        open_source(folder)
    assert says in str(caught.value)


def test_missing_expert_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    tensors = checkpoint_tensors(olmoe_config(), json.loads((folder / "config.json").read_text())["vocab_size"])
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    write_safetensors(folder / "model.safetensors", {n: ("BF16", to_bf16(a)) for n, a in tensors.items()})
    with pytest.raises(BadFile, match="expert 2 of layer 1: up_proj is missing"):
        open_source(folder)


def test_our_own_files_are_no_source(stock: Path, tmp_path: Path) -> None:
    convert(stock, tmp_path / "m.gguf")
    for name, kind in (("m.gguf", "skeleton"), ("m.experts.gguf", "experts")):
        with pytest.raises(UsageError, match=f"already a moe-edge {kind} file"):
            convert(tmp_path / name, tmp_path / "again.gguf")


def test_output_in_the_way_is_refused(stock: Path, tmp_path: Path) -> None:
    source = Path(shutil.copy(stock, tmp_path / "s.gguf"))
    with pytest.raises(UsageError, match="is the source itself"):
        convert(source, source, overwrite=True)
    (tmp_path / "m.experts.gguf").write_text("precious")
    with pytest.raises(UsageError, match=r"m\.experts\.gguf: exists already"):
        convert(source, tmp_path / "m.gguf")
    assert (tmp_path / "m.experts.gguf").read_text() == "precious"
    convert(source, tmp_path / "m.gguf", overwrite=True)
    open_model(tmp_path / "m.gguf", verify=True)
    for bad in ("m", "m.experts.gguf"):
        with pytest.raises(UsageError, match="must be the name of a skeleton"):
            convert(source, tmp_path / bad, overwrite=True)
    with pytest.raises(MissingFile, match="no such folder"):
        convert(source, tmp_path / "none" / "m.gguf")


# -- failures while writing


def failing_write(after_bytes: int, error: BaseException) -> Callable[[int, Any], int]:
    """os.write that raises once so many bytes are written."""
    real, done = os.write, 0

    def fail(fd: int, data: Any) -> int:
        nonlocal done
        done += len(data)
        if done > after_bytes:
            raise error
        return real(fd, data)

    return fail


@pytest.mark.parametrize("after_bytes", [0, 100_000, 1_000_000, 4_000_000])
def test_full_disk_names_file_and_bytes_and_leaves_nothing(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_bytes: int
) -> None:
    monkeypatch.setattr(os, "write", failing_write(after_bytes, OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(DiskFull, match=r"m(\.experts)?\.gguf: no room left while writing: the file needs \d+ bytes"):
        convert(stock, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_lack_of_space_is_seen_before_writing(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: usage._replace(free=1000))  # type: ignore[attr-defined]
    with pytest.raises(DiskFull, match=r"needs \d+ bytes but .* has 1000 free"):
        convert(stock, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
def test_interruption_leaves_nothing(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(os, "write", failing_write(1_000_000, error))
    with pytest.raises((KeyboardInterrupt, MissingFile)):
        convert(stock, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_byte_flipped_on_the_way_is_caught(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.write, 0

    def flip(fd: int, data: Any) -> int:
        nonlocal calls
        calls += 1
        changed = bytearray(data)
        if calls == 12 and len(changed) > 100:
            changed[50] ^= 1
        return real(fd, changed)

    monkeypatch.setattr(os, "write", flip)
    with pytest.raises(BadChecksum, match=r"m\.experts\.gguf: tensor 'blk\.\d\.ffn_\w+\.\d\.weight' reads back"):
        convert(stock, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_pair_that_fails_its_proof_is_removed(stock: Path, tmp_path: Path) -> None:
    def disprove(skeleton: Path) -> None:
        assert skeleton.exists() and skeleton.with_name("m.experts.gguf").exists()
        raise BadFile("does not load")

    with pytest.raises(BadFile, match="does not load"):
        convert(stock, tmp_path / "m.gguf", prove=disprove)
    assert not list(tmp_path.iterdir())


def test_source_cut_while_reading_is_named(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pread", lambda fd, nbytes, offset: b"")
    with pytest.raises(CutFile, match=r"model\.safetensors: tensor 'model\.layers\.0\.mlp\.experts\.0\.up_proj"):
        convert(checkpoint, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


# -- opening


@pytest.fixture
def pair(stock: Path, tmp_path: Path) -> Path:
    convert(stock, tmp_path / "m.gguf")
    return tmp_path / "m.gguf"


def flip_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_altered_expert_is_found_by_verify(pair: Path) -> None:
    model = open_model(pair)
    piece = model.pieces[7]
    flip_byte(model.files[0], piece.offset + 100)
    open_model(pair)
    with pytest.raises(BadChecksum) as caught:
        open_model(pair, verify=True)
    assert piece.name in str(caught.value) and "m.experts.gguf" in str(caught.value)


def test_store_of_another_conversion_is_wrong(pair: Path, stock: Path, tmp_path: Path) -> None:
    other = convert(stock, tmp_path / "other.gguf", type="Q4_0")
    mine = open_model(pair).store_id
    shutil.copy(tmp_path / "other.experts.gguf", tmp_path / "m.experts.gguf")
    with pytest.raises(WrongStore) as caught:
        open_model(pair)
    assert mine in str(caught.value) and other.store_id in str(caught.value)


def test_missing_store_is_named_with_the_command(pair: Path) -> None:
    pair.with_name("m.experts.gguf").unlink()
    with pytest.raises(MissingFile, match=r"m\.experts\.gguf: .*moe-edge convert stock\.gguf -o .*m\.gguf"):
        open_model(pair)


def test_cut_store_names_the_tensor(pair: Path) -> None:
    store = pair.with_name("m.experts.gguf")
    store.write_bytes(store.read_bytes()[:-10])
    with pytest.raises(
        CutFile, match=r"tensor 'blk\.1\.ffn_down_exps\.3\.weight' needs bytes \d+-\d+ but the file ends"
    ):
        open_model(pair)


def test_store_without_magic_is_refused(pair: Path) -> None:
    pair.with_name("m.experts.gguf").write_bytes(b"not a model at all")
    with pytest.raises(BadMagic):
        open_model(pair)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b"blk.1.ffn_up_exps.2.weight", b"blk.1.ffn_up_exps.9.weight", "'blk.1.ffn_up_exps.2.weight' is missing"),
        (b"blk.1.ffn_up_exps.2.weight", b"blk.1.ffn_xx_exps.2.weight", "is not one of an expert store"),
        (b"\x04\x00\x00\x00high", b"\x04\x00\x00\x00hihi", "levels ['hihi']"),
        (b"moe_edge.checksums", b"moe_edge.checkswms", "has 0 checksums"),
        (b"moe_edge.format_version\x04\0\0\0\1", b"moe_edge.format_version\x04\0\0\0\2", "format version 2"),
        (b"moe_edge.kind", b"moe_edge.kinb", "expected a moe-edge experts file"),
    ],
)
def test_store_that_is_not_what_it_claims_is_refused(pair: Path, old: bytes, new: bytes, says: str) -> None:
    store = pair.with_name("m.experts.gguf")
    data = store.read_bytes()
    if b"high" in old:  # the length of a string is eight bytes
        old, new = (each[:4] + bytes(4) + each[4:] for each in (old, new))
    assert data.count(old) == 1
    store.write_bytes(data.replace(old, new))
    with pytest.raises(BadFile) as caught:
        open_model(pair)
    assert says in str(caught.value)


def test_flipped_store_header_never_escapes_our_errors(pair: Path) -> None:
    store = pair.with_name("m.experts.gguf")
    data, n = store.read_bytes(), len(read_gguf(store).header)
    for at in range(0, n, 3):
        with open(store, "r+b") as file:
            file.seek(at)
            file.write(bytes([data[at] ^ 0x11]))
        try:
            open_model(pair)
        except MoeEdgeError:
            pass
        with open(store, "r+b") as file:
            file.seek(at)
            file.write(data[at : at + 1])


def test_store_given_as_model_names_its_skeleton(pair: Path) -> None:
    with pytest.raises(UsageError, match=r"give its skeleton, .*m\.gguf"):
        open_model(pair.with_name("m.experts.gguf"))


def test_folder_with_one_model_is_that_model(pair: Path, stock: Path) -> None:
    assert open_model(pair.parent).skeleton == pair
    shutil.copy(stock, pair.parent / "second.gguf")
    with pytest.raises(MissingFile, match=r"exactly one GGUF model, found 2: m\.gguf, second\.gguf"):
        open_model(pair.parent)


def test_checkpoint_folder_names_the_command(checkpoint: Path) -> None:
    with pytest.raises(MissingFile, match="moe-edge convert"):
        open_model(checkpoint)


# -- stock GGUFs, in place


def test_stock_gguf_is_read_in_place(stock: Path, tmp_path: Path) -> None:
    model = open_model(stock, tmp_path)
    assert model.in_place and model.checksums is None and model.files == (stock,)
    assert model.skeleton.parent == tmp_path / "skeletons"
    stacked = open_gguf(stock).tensors["blk.0.ffn_down_exps.weight"]
    piece = model.pieces[3 * 2 + 2]
    assert piece.name == "blk.0.ffn_down_exps.weight[2]" and (piece.cols, piece.rows) == (N_FF, N_EMBD)
    assert (
        piece.offset == stacked.offset + 2 * stacked.nbytes // N_EXPERT and piece.nbytes == stacked.nbytes // N_EXPERT
    )
    assert model.expert_bytes == sum(p.nbytes for p in model.pieces) == 6 * stacked.nbytes
    kv = read_gguf(model.skeleton).kv
    stat = stock.stat()
    assert kv["moe_edge.in_place"] is True and kv["moe_edge.store_id"] == model.store_id
    assert kv["moe_edge.source"] == str(stock) and kv["moe_edge.source_files"] == [str(stock)]
    assert kv["moe_edge.source_identity"] == [f"{stat.st_size}:{stat.st_mtime_ns}"]
    assert open_model(model.skeleton) == model
    with pytest.raises(UsageError, match="carries no checksums"):
        open_model(stock, tmp_path, verify=True)


def test_cached_skeleton_is_found_again_until_the_source_changes(stock: Path, tmp_path: Path) -> None:
    source = Path(shutil.copy(stock, tmp_path / "s.gguf"))
    first = skeleton_for(source, tmp_path)
    written = first.stat().st_mtime_ns
    assert skeleton_for(source, tmp_path) == first and first.stat().st_mtime_ns == written
    os.utime(source, ns=(1, 1))
    assert skeleton_for(source, tmp_path) != first
    with pytest.raises(WrongStore, match="was made for"):
        open_model(first)
    assert not list((tmp_path / "skeletons").glob("*.part"))


def test_damaged_cached_skeleton_is_written_again(stock: Path, tmp_path: Path) -> None:
    first = skeleton_for(stock, tmp_path)
    whole = first.read_bytes()
    first.write_bytes(whole[:5000])
    assert skeleton_for(stock, tmp_path) == first and first.read_bytes() == whole


def test_cache_folder_follows_the_environment(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_EDGE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert skeleton_for(stock).parent == tmp_path / "xdg" / "moe-edge" / "skeletons"
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "own"))
    assert skeleton_for(stock).parent == tmp_path / "own" / "skeletons"


def test_split_stock_gguf_is_read_in_place(stock: Path, tmp_path: Path) -> None:
    whole = gguf.GGUFReader(stock)
    tensors, parts = whole.tensors, [tmp_path / f"s-0000{n}-of-00002.gguf" for n in (1, 2)]
    for number, path in enumerate(parts):
        writer = gguf.GGUFWriter(path, "olmoe")
        if number == 0:
            writer.add_uint32("olmoe.feed_forward_length", N_FF)
            writer.add_uint32("olmoe.expert_used_count", 2)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        for tensor in tensors[number::2]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    split, one = open_model(parts[1], tmp_path), open_model(stock, tmp_path)
    assert split.files == tuple(parts) and {piece.file for piece in split.pieces} == {0, 1}
    assert [piece_bytes(split, n) for n in range(24)] == [piece_bytes(one, n) for n in range(24)]
    assert not [key for key in read_gguf(split.skeleton).kv if key.startswith("split.")]
    assert convert(parts[0], tmp_path / "m.gguf").store_id == convert(stock, tmp_path / "n.gguf").store_id


def test_experts_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    path = write_stock(tmp_path / "m.gguf")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.ffn_gate_exps.weight", b"blk.1.ffn_gate_expz.weight"))
    assert open_model(path, tmp_path).layers[1].projections == ("up", "down")
    path.write_bytes(data.replace(b"blk.1.ffn_down_exps.weight", b"blk.1.ffn_down_expz.weight"))
    with pytest.raises(BadFile, match="layer 1 has expert tensors"):
        open_model(path, tmp_path)


# -- the runtime stays lean and fast


def test_opening_a_model_imports_neither_gguf_nor_numpy(stock: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom moe_edge.convert.store import open_model\n"
        f"open_model({str(stock)!r}, {str(tmp_path)!r})\n"
        "assert not {'gguf', 'numpy', 'llama_cpp'} & set(sys.modules), 'heavy imports'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_store_of_18432_tensors_opens_in_half_a_second(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "qwen3moe")
    writer.add_uint32("qwen3moe.expert_feed_forward_length", 1)
    writer.add_uint32("qwen3moe.expert_used_count", 8)
    for layer in range(48):
        for name in ("gate", "up", "down"):
            writer.add_tensor(f"blk.{layer}.ffn_{name}_exps.weight", np.ones((128, 1, 1), np.float32))
    writer.add_tensor("token_embd.weight", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert(tmp_path / "big.gguf", tmp_path / "m.gguf", threads=1)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        assert len(open_model(tmp_path / "m.gguf").pieces) == 18432
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5, seconds


def test_small_and_odd_tensors_are_never_quantized() -> None:
    assert may_quantize("blk.0.attn_q.weight", (64, 64))
    for name, shape in (
        ("blk.0.attn_norm.weight", (64,)), ("blk.0.attn_q_norm.weight", (64, 4)), ("blk.0.attn_q.bias", (64, 1)),
        ("blk.0.ffn_gate_inp.weight", (64, 8)), ("blk.0.ssm_conv1d.weight", (4, 64)),
    ):  # fmt: skip
        assert not may_quantize(name, shape)
