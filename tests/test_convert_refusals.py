"""What is not converted: refused by name, with the number found and the number needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from checkpoints import (
    checkpoint_tensors,
    floats,
    olmoe_config,
    qwen3_config,
    write_checkpoint,
    write_stock,
)
from moe_edge.convert.checkpoints import open_source
from moe_edge.convert.convert import convert
from moe_edge.models.errors import (
    BadFile,
    MissingFile,
    NotMoE,
    UnknownName,
    UsageError,
)
from moe_edge.models.store.store import open_model
from test_safetensors import to_bf16, write_safetensors


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
        ({"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope'; known: default, linear, yarn"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized with 'awq'"),
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


@pytest.mark.parametrize("config", [olmoe_config(), qwen3_config()], ids=["olmoe", "qwen3moe"])
@pytest.mark.parametrize("name", ["num_local_experts", "n_routed_experts"])
def test_the_number_of_experts_has_several_names(tmp_path: Path, config: dict[str, Any], name: str) -> None:
    """Current transformers write num_local_experts for Qwen3Moe."""
    folder = write_checkpoint(tmp_path / "named", dict(config))
    other = json.loads((folder / "config.json").read_text())
    other[name] = other.pop("num_experts")
    want = open_source(folder).kv.record(f"{open_source(folder).architecture.name}.expert_count")
    (folder / "config.json").write_text(json.dumps(other))
    assert open_source(folder).kv.record(f"{open_source(folder).architecture.name}.expert_count") == want


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_local_experts": 5}, "about the number of experts: num_experts is 4, num_local_experts is 5"),
        ({"num_experts": None}, "does not say how many experts"),
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
