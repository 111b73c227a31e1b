"""Families: what is collected, tensors that are made of others, FP8 and FP4 checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import checkpoint_tensors, olmoe_config, write_checkpoint
from moe_edge.convert.convert import convert
from moe_edge.convert.hf import hf_source
from moe_edge.models.architectures import find_hf_class
from moe_edge.models.errors import BadFile, MissingFile, UnknownName
from moe_edge.models.families import ARCHITECTURES, CHECKPOINTS, FAMILIES, REFUSED
from moe_edge.models.families.gpt_oss import experts
from moe_edge.models.families.tensors import (
    computed,
    e4m3_values,
    minus_exp,
    moved,
    mxfp4,
    plus_one,
    rope_rows,
    slice_of,
    to_bf16,
    value,
)
from moe_edge.models.formats.derived import DerivedEntry
from moe_edge.models.formats.floats import bf16_to_f32
from moe_edge.models.formats.safetensors import SafeTensor, open_safetensors
from moe_edge.models.formats.source_files import SourceFiles
from test_safetensors import to_bf16 as cut_to_bf16
from test_safetensors import write_safetensors

ROOT = Path(__file__).resolve().parents[1]
RNG = np.random.default_rng(3)


def test_no_two_families_claim_an_architecture_or_a_class() -> None:
    claimed = [each.name for family in FAMILIES.values() for each in family.architectures]
    assert len(claimed) == len(set(claimed)) == len(ARCHITECTURES)
    assert not set(ARCHITECTURES) & set(REFUSED)
    named = [name for family in FAMILIES.values() for each in family.checkpoints for name in each.classes]
    assert len(named) == len(set(named))
    assert {each.architecture for each in CHECKPOINTS.values()} <= set(ARCHITECTURES)


def test_the_page_of_families_names_every_class_and_architecture() -> None:
    page = (ROOT / "docs" / "FAMILIES.md").read_text()
    for name in [*CHECKPOINTS, *ARCHITECTURES, *REFUSED]:
        assert f"`{name}`" in page, name


def test_a_class_that_llama_cpp_computes_otherwise_is_refused_with_the_reason() -> None:
    with pytest.raises(UnknownName, match=r"PhimoeForCausalLM.*SparseMixer.*GGUF of it runs"):
        find_hf_class("PhimoeForCausalLM", "config.json")
    with pytest.raises(UnknownName, match="did you mean 'MixtralForCausalLM'"):
        find_hf_class("MistralForCausalLM", "config.json")


# ---- tensors made of others


def tensor_of(tmp_path: Path, array: np.ndarray, dtype: str = "F32") -> SafeTensor:
    stored = {"BF16": cut_to_bf16, "F16": lambda a: a.astype(np.float16), "F32": lambda a: a}.get(dtype, lambda a: a)
    write_safetensors(tmp_path / "model.safetensors", {"t": (dtype, stored(array))})  # type: ignore[no-untyped-call]
    return open_safetensors(tmp_path).tensors["t"]


def read(entry: DerivedEntry, code: str = "<f4") -> np.ndarray:
    with SourceFiles() as files:
        whole = files.read(entry, 0, entry.nbytes)
        step = max(1, entry.nbytes // 3)
        parts = b"".join(files.read(entry, at, min(step, entry.nbytes - at)) for at in range(0, entry.nbytes, step))
    assert whole == parts  # by pieces as at once
    result: np.ndarray = np.frombuffer(whole, code).reshape(entry.shape[::-1])
    return result


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_moving_numbers_changes_none_of_them(tmp_path: Path, dtype: str) -> None:
    tensor = tensor_of(tmp_path, RNG.standard_normal((8, 6)).astype(np.float32), dtype)
    code = {"F32": "<u4"}.get(dtype, "<u2")
    bits = np.frombuffer(open_safetensors(tmp_path).read_raw("t"), code).reshape(8, 6)
    turned = moved("x", tensor, (6, 8), lambda each: each.T)
    assert turned.type == tensor.entry("t").type
    assert np.array_equal(read(turned, code), bits.T)


def test_rope_rows_go_from_halves_to_pairs(tmp_path: Path) -> None:
    """Two heads of four rows: 0 1 | 2 3 of each head become 0 2 1 3."""
    rows = np.arange(8, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    turned = read(rope_rows("q", tensor_of(tmp_path, rows), 2))
    assert turned[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_computed_tensors_are_f32_of_any_type(tmp_path: Path) -> None:
    values = np.array([0.5, -1.0, 2.0], np.float32)
    for dtype in ("F32", "F16", "BF16"):
        tensor = tensor_of(tmp_path, values, dtype)
        assert read(plus_one("n", tensor)).tolist() == [1.5, 0.0, 3.0]
        assert read(minus_exp("a", tensor, (3, 1)))[:, 0] == pytest.approx(-np.exp(values))
    assert read(value("rope", tensor, [1.0, 1e30])).tolist() == [1.0, np.float32(1e30)]


def test_a_tensor_of_another_size_than_planned_is_a_fault_with_a_name(tmp_path: Path) -> None:
    tensor = tensor_of(tmp_path, np.zeros((4, 4), np.float32))
    wrong = computed("x", [tensor], (4, 4), lambda parts: parts[0].floats()[:2])
    with pytest.raises(ValueError, match="x: 32 bytes were made, 64 were planned"):
        read(wrong)


# ---- FP8


def test_values_of_fp8_are_those_of_the_format() -> None:
    values = e4m3_values()
    assert values[0x00] == 0 and values[0x38] == 1.0 and values[0x7E] == 448 and values[0xB8] == -1.0
    assert values[0x01] == 2.0**-9 and values[0x08] == 2.0**-6
    assert np.isnan(values[[0x7F, 0xFF]]).all() and np.isfinite(np.delete(values, [0x7F, 0xFF])).all()
    assert (np.diff(values[:0x7F]) > 0).all()


@pytest.mark.parametrize(("kind", "end"), [("blocks", "_scale_inv"), ("rows", "_scale"), ("one", "_scale")])
def test_an_fp8_checkpoint_converts_to_what_its_bf16_would(tmp_path: Path, kind: str, end: str) -> None:
    plain, fp8 = write_checkpoint(tmp_path / "plain"), write_checkpoint(tmp_path / "fp8")
    n_vocab = json.loads((plain / "config.json").read_text())["vocab_size"]
    tensors = checkpoint_tensors(olmoe_config(), n_vocab)
    as_bf16, as_fp8 = {}, {}
    for name, array in tensors.items():
        if "_proj" not in name:
            as_bf16[name] = as_fp8[name] = ("BF16", cut_to_bf16(array))
            continue
        n_rows, n_cols = array.shape
        shape = {"blocks": (-(-n_rows // 128), -(-n_cols // 128)), "rows": (n_rows, 1), "one": (1,)}[kind]
        signs = RNG.integers(0, 2, array.shape) << 7
        codes = (RNG.integers(0, 0x7F, array.shape) | signs).astype(np.uint8)
        scales = (RNG.random(shape) * 1e-3 + 1e-4).astype(np.float32)
        spread = np.kron(scales, np.ones((128, 128), np.float32))[:n_rows, :n_cols] if kind == "blocks" else scales
        as_fp8[name] = ("F8_E4M3", codes)
        as_fp8[name + end] = ("F32", scales)
        as_bf16[name] = ("BF16", to_bf16(e4m3_values()[codes] * spread))
    write_safetensors(plain / "model.safetensors", as_bf16)
    write_safetensors(fp8 / "model.safetensors", as_fp8)
    config = json.loads((fp8 / "config.json").read_text())
    (fp8 / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    source = hf_source(fp8)
    assert not any("_scale" in name for name in source.experts)
    for folder in (plain, fp8):
        convert(folder, tmp_path / folder.name / "m.gguf")
    wanted, found = (gguf.GGUFReader(tmp_path / name / "m.experts.gguf") for name in ("plain", "fp8"))
    assert [each.name for each in wanted.tensors] == [each.name for each in found.tensors]
    for a, b in zip(wanted.tensors, found.tensors, strict=True):
        assert np.array_equal(a.data, b.data), a.name


def test_fp8_without_scales_or_with_wrong_ones_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")
    n_vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    tensors = {n: ("BF16", cut_to_bf16(a)) for n, a in checkpoint_tensors(olmoe_config(), n_vocab).items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = ("F8_E4M3", np.zeros((256, 256), np.uint8))
    write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(MissingFile, match=r"q_proj.weight' is FP8 and has no scales"):
        hf_source(folder)
    tensors[name + "_scale_inv"] = ("F32", np.ones((3, 2), np.float32))
    write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(BadFile, match=r"shape \[3, 2\], expected \[2, 2\] for blocks"):
        hf_source(folder)


# ---- FP4 of gpt-oss

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def test_fp4_blocks_keep_every_value(tmp_path: Path) -> None:
    """Against the definition of the format, and read back by gguf's own reader of MXFP4."""
    n_expert, n_rows, n_blocks = 3, 6, 2
    blocks = RNG.integers(0, 256, (n_expert, n_rows, n_blocks, 16)).astype(np.uint8)
    scales = RNG.integers(120, 135, (n_expert, n_rows, n_blocks)).astype(np.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    write_safetensors(
        tmp_path / "model.safetensors", {f"{name}_blocks": ("U8", blocks), f"{name}_scales": ("U8", scales)}
    )
    tensors = open_safetensors(tmp_path).tensors
    found = experts(None, f"{name}_blocks", tensors[f"{name}_blocks"], tensors)  # type: ignore[arg-type]
    assert found is not None and set(found) == {(0, e, p) for e in range(n_expert) for p in ("gate", "up")}
    assert experts(None, f"{name}_scales", tensors[f"{name}_scales"], tensors) == {}  # type: ignore[arg-type]
    values = np.stack((FP4[blocks & 15], FP4[blocks >> 4]), -1).reshape(n_expert, n_rows, n_blocks, 32)
    wanted = (values * 2.0 ** (scales[..., None].astype(np.float32) - 127)).reshape(n_expert, n_rows, -1)
    for (_, expert, part), entry in found.items():
        assert isinstance(entry, DerivedEntry) and entry.shape == (64, 3)
        with SourceFiles() as files:
            data = np.frombuffer(files.read(entry, 0, entry.nbytes), np.uint8).reshape(3, -1)
        got = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.MXFP4)
        assert np.array_equal(got, wanted[expert, {"gate": 0, "up": 1}[part] :: 2])


def test_a_slice_of_stacked_tensors_is_a_range_of_its_own(tmp_path: Path) -> None:
    array = RNG.standard_normal((3, 4, 5)).astype(np.float32)
    one = slice_of(tensor_of(tmp_path, array), 2)
    assert np.array_equal(read(moved("x", one, (4, 5), lambda bits: bits)), array[2])
    assert mxfp4.__doc__ is not None and bf16_to_f32(to_bf16(np.float32([1.5]))).tolist() == [1.5]  # type: ignore[arg-type]
