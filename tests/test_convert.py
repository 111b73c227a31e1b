"""Conversions end to end: what is written, what it is read back as, and that a failure leaves nothing behind."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from checkpoints import (
    N_EMBD,
    N_EXPERT,
    N_FF,
    N_LAYER,
    floats,
    olmoe_config,
    piece_bytes,
    qwen3_config,
    write_checkpoint,
    write_stock,
)
from moe_edge.convert.checkpoints import open_source
from moe_edge.convert.conversion_plan import ExpertTypes, make_plan, may_quantize
from moe_edge.convert.convert import convert
from moe_edge.convert.quantize import dequantize, quantize
from moe_edge.models.errors import (
    BadChecksum,
    BadFile,
    CutFile,
    DiskFull,
    MissingFile,
    UsageError,
)
from moe_edge.models.formats import write
from moe_edge.models.formats.ggml_types import BY_NAME, type_name
from moe_edge.models.formats.gguf import open_gguf, read_gguf
from moe_edge.models.store.experts import MoELayer
from moe_edge.models.store.source import Source
from moe_edge.models.store.store import open_model


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


@pytest.mark.usefixtures("llama_without_repacking")
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
    assert "F32 -> Q4_K" in text and "ffn_up_exps.low" in text and "6 stubs" in text
    assert json.loads(json.dumps(data)) == data
    assert data["experts"][0] == {
        "name": "blk.0.ffn_up_exps.0.weight", "shape": [N_EMBD, N_FF], "source_type": "F32", "type": "Q4_K",
        "bytes": N_EMBD * N_FF // 256 * 144,
    }  # fmt: skip


def test_fallback_is_counted_and_reported(tmp_path: Path) -> None:
    plan = make_plan(open_source(write_stock(tmp_path / "m.gguf", n_ff=96)), "Q4_K")
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


def expert_rows(path: Path, key: tuple[int, int, str]) -> np.ndarray:
    """The weights of one projection of one expert of a checkpoint, as float32."""
    entry = open_source(path).experts[key]
    data = entry.path.read_bytes()[entry.offset : entry.offset + entry.nbytes]
    return dequantize(data, entry.type, entry.shape[0])


def random_importance(path: Path, *left_out: tuple[int, int, str]) -> dict[tuple[int, int, str], np.ndarray]:
    experts = open_source(path).experts
    return {key: np.abs(floats(entry.shape[0])) + 0.01 for key, entry in experts.items() if key not in left_out}


def test_types_differ_by_level_and_projection(checkpoint: Path, tmp_path: Path) -> None:
    types = ExpertTypes("Q4_K", "Q2_K", {("high", "down"): "Q6_K"})
    report = convert(checkpoint, tmp_path / "m.gguf", types=types)
    model = open_model(tmp_path / "m.gguf", verify=True)
    for index, piece in enumerate(model.pieces):
        _, layer, stacked, expert, *low = piece.name.removesuffix(".weight").split(".")
        projection = stacked.removeprefix("ffn_").removesuffix("_exps")
        needed = "Q2_K" if low else "Q6_K" if projection == "down" else "Q4_K"
        assert type_name(piece.type) == needed, piece.name
        rows = expert_rows(checkpoint, (int(layer), int(expert), projection))
        assert piece_bytes(model, index) == quantize(rows, BY_NAME[needed].id)
    bits = {level: report.plan.bits_per_weight(level) for level in ("high", "low")}
    assert bits == {"high": (4.5 + 4.5 + 6.5625) / 3, "low": 2.625}
    line = f"high: 5.19 bits per weight on average: {2 * N_LAYER * N_EXPERT} x Q4_K, {N_LAYER * N_EXPERT} x Q6_K"
    assert line in report.text() and line in report.plan.text()
    assert report.plan.to_json()["bits_per_weight"] == bits


def test_homes_give_single_experts_their_types(checkpoint: Path, tmp_path: Path) -> None:
    homes = {(1, 2, "up"): BY_NAME["Q8_0"].id, (0, 0, "down"): BY_NAME["Q3_K"].id}
    types = ExpertTypes("Q4_K", "Q2_K", {("low", "down"): "Q3_K", ("high", "up"): "Q5_K"}, homes)
    plan = make_plan(open_source(checkpoint), types=types)
    found = {each.name: type_name(each.type) for each in plan.experts}
    assert found["blk.1.ffn_up_exps.2.weight"] == "Q8_0" and found["blk.1.ffn_up_exps.1.weight"] == "Q5_K"
    assert found["blk.0.ffn_down_exps.0.weight"] == "Q3_K" and found["blk.0.ffn_down_exps.1.weight"] == "Q4_K"
    assert found["blk.1.ffn_up_exps.2.low.weight"] == "Q2_K" and found["blk.1.ffn_down_exps.2.low.weight"] == "Q3_K"
    dense = make_plan(open_source(checkpoint), types=ExpertTypes(homes=homes))
    assert {type_name(each.type) for each in dense.experts} == {"BF16", "Q8_0", "Q3_K"}
    assert type_name(dense.dense_type) == "Q8_0"


def fused_source(source: Source) -> Source:
    """`source` as if gate and up were one tensor."""
    layers = tuple(dataclasses.replace(layer, fused=True, projections=("gate_up", "down")) for layer in source.layers)
    experts = {}
    for (layer, expert, projection), entry in source.experts.items():
        if projection == "down":
            experts[layer, expert, "down"] = entry
        elif projection == "gate":
            shape = (entry.shape[0], 2 * entry.shape[1])
            experts[layer, expert, "gate_up"] = dataclasses.replace(entry, shape=shape, nbytes=2 * entry.nbytes)
    return dataclasses.replace(source, layers=layers, experts=experts)


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ({"gate": "Q6_K"}, "Q6_K"), ({"up": "Q6_K"}, "Q6_K"), ({"gate": "Q6_K", "up": "q6_k"}, "Q6_K"),
        ({"gate_up": "Q5_K"}, "Q5_K"), ({"down": "Q6_K"}, "Q4_K"), ({"gate": "Q6_K", "up": "Q5_K"}, None),
    ],
)  # fmt: skip
def test_fused_layers_take_the_type_of_gate_or_up(checkpoint: Path, given: dict[str, str], needed: str | None) -> None:
    source = fused_source(open_source(checkpoint))
    types = ExpertTypes("Q4_K", by_projection={("high", name): kind for name, kind in given.items()})
    if needed is None:
        with pytest.raises(UsageError, match="cannot be Q5_K and Q6_K at the level high"):
            make_plan(source, types=types)
        return
    found = {each.name: type_name(each.type) for each in make_plan(source, types=types).experts}
    assert found["blk.0.ffn_gate_up_exps.0.weight"] == needed


@pytest.mark.parametrize(
    ("types", "says"),
    [
        (ExpertTypes("Q4_K", None, {("low", "down"): "Q2_K"}), "needs a low level"),
        (ExpertTypes("Q4_K", None, {("high", "gate_up"): "Q6_K"}), "no expert projection 'gate_up'; known: up, gate"),
        (ExpertTypes("Q4_K", None, {("middle", "up"): "Q6_K"}), "unknown level 'middle'; known: high, low"),
        (ExpertTypes("Q4_K", None, {("high", "up"): "Q6K"}), "did you mean 'Q6_K'"),
        (ExpertTypes("Q4_K", None, {}, {(9, 0, "up"): 12}), "no up of expert 0 in layer 9"),
        (ExpertTypes("Q4_K", None, {}, {(0, 0, "up"): 15}), "cannot quantize to Q8_K"),
        (ExpertTypes("Q4_K", "IQ2_XXS"), "IQ2_XXS needs an importance matrix"),
    ],
)
def test_types_the_model_cannot_have_are_refused(checkpoint: Path, types: ExpertTypes, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_plan(open_source(checkpoint), types=types)
    assert says in str(caught.value)


def test_importance_reaches_the_quantizer_at_both_levels(checkpoint: Path, tmp_path: Path) -> None:
    unused = (1, 2, "down")
    importance = random_importance(checkpoint, unused)
    importance[0, 0, "up"] = np.zeros(N_EMBD, np.float32)  # as good as unused
    dense = {"blk.0.attn_q.weight": np.abs(floats(N_EMBD)) + 0.01}
    convert(
        checkpoint, tmp_path / "m.gguf", "Q4_K", "Q4_K", low_type="IQ2_XXS", importance=importance,
        dense_importance=dense,
    )  # fmt: skip
    model = open_model(tmp_path / "m.gguf", verify=True)
    names = [piece.name for piece in model.pieces]
    others = {key: [importance[key[0], each, key[2]] for each in range(N_EXPERT) if each != key[1]]
              for key in (unused, (0, 0, "up"))}  # fmt: skip
    for key in (unused, (0, 0, "up"), (1, 3, "gate")):
        weights = np.mean(others[key], axis=0, dtype=np.float64) if key in others else importance[key]
        rows = expert_rows(checkpoint, key)
        for level, kind in (("", "Q4_K"), (".low", "IQ2_XXS")):
            found = piece_bytes(model, names.index(f"blk.{key[0]}.ffn_{key[2]}_exps.{key[1]}{level}.weight"))
            assert found == quantize(rows, BY_NAME[kind].id, weights.astype(np.float32)), (key, kind)  # type: ignore[arg-type]
    skeleton = read_gguf(model.skeleton).tensors
    source = {entry.name: entry for entry in open_source(checkpoint).dense}
    for name in ("blk.0.attn_q.weight", "blk.1.attn_q.weight"):
        ours, theirs = skeleton[name], source[name]
        data = theirs.path.read_bytes()[theirs.offset : theirs.offset + theirs.nbytes]
        written = ours.path.read_bytes()[ours.offset : ours.offset + ours.nbytes]
        assert written == quantize(dequantize(data, theirs.type, N_EMBD), 12, dense.get(name))


def test_tensor_without_the_importance_it_needs_is_named(checkpoint: Path, tmp_path: Path) -> None:
    importance = {key: values for key, values in random_importance(checkpoint).items() if key[0] == 0}
    with pytest.raises(UsageError, match=r"'blk\.1\.ffn_up_exps\.0\.low\.weight' has no importance, which IQ2_XXS"):
        convert(checkpoint, tmp_path / "m.gguf", "Q4_K", low_type="IQ2_XXS", importance=importance)
    dense = {"blk.0.attn_q.weight": np.ones(N_EMBD, np.float32)}
    with pytest.raises(UsageError, match="has no importance, which IQ2_S needs"):
        convert(checkpoint, tmp_path / "m.gguf", "Q4_K", "IQ2_S", dense_importance=dense)
    importance[0, 1, "up"] = np.ones(3, np.float32)
    with pytest.raises(BadFile, match=r"importance of up of expert 1 in layer 0: has shape \[3\]"):
        convert(checkpoint, tmp_path / "m.gguf", "Q4_K", importance=importance)
    with pytest.raises(UsageError, match="has no up of expert 0 in layer 7, which has an importance"):
        convert(checkpoint, tmp_path / "m.gguf", "Q4_K", importance={(7, 0, "up"): np.ones(N_EMBD, np.float32)})
    with pytest.raises(BadFile, match=r"importance of tensor 'blk\.0\.attn_q\.weight': has shape \[3\]"):
        dense = {"blk.0.attn_q.weight": np.ones(3, np.float32)}
        convert(checkpoint, tmp_path / "m.gguf", "Q4_K", "Q4_K", dense_importance=dense)
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("after_bytes", [0, 100_000, 1_000_000, 3_360_000])
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


def test_small_and_odd_tensors_are_never_quantized() -> None:
    assert may_quantize("blk.0.attn_q.weight", (64, 64))
    for name, shape in (
        ("blk.0.attn_norm.weight", (64,)), ("blk.0.attn_q_norm.weight", (64, 4)), ("blk.0.attn_q.bias", (64, 1)),
        ("blk.0.ffn_gate_inp.weight", (64, 8)), ("blk.0.ssm_conv1d.weight", (4, 64)),
    ):  # fmt: skip
        assert not may_quantize(name, shape)
