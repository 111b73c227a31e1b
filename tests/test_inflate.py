"""An inflated model computes what the small one computes."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import inflate as inflate_module
from inflate import encode_padded, inflate
from moe_edge.convert.quantize import dequantize, quantize
from moe_edge.models.errors import UnknownName, UsageError
from moe_edge.models.formats.ggml_types import BY_NAME, row_bytes
from random_models import Shape, write_random_model
from reference import stock_logits

TOKENS: list[int] = np.random.default_rng(3).integers(0, 512, 48).tolist()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inflate") / "small.gguf"
    return write_random_model(path, "olmoe", Shape(n_expert=8, n_used=3), expert_type="F32", dense_type="F32")


# 1024 = 4 * 256: the norms' factor is exactly 1/2, and the logits came out equal. Other factors round, and then some
# numbers round the other way in the F16 KV cache: up to 0.0026 was seen, against 0.0012 for another micro-batch.
@pytest.mark.parametrize(
    ("n_embd", "n_ff", "tolerance"), [(256, 384, 1e-3), (1024, 512, 1e-3), (2048, 256, 3e-3), (640, 256, 1e-2)]
)
def test_logits_are_those_of_the_small_model(
    small: Path, tmp_path: Path, n_embd: int, n_ff: int, tolerance: float
) -> None:
    inflate(small, tmp_path / "big.gguf", n_embd, n_ff, "F32", "F32")
    expected = stock_logits(small, TOKENS)
    found = stock_logits(tmp_path / "big.gguf", TOKENS)
    assert np.abs(found - expected).max() < tolerance
    assert np.array_equal(found.argmax(axis=1), expected.argmax(axis=1))


def test_every_tensor_has_the_new_size_and_the_asked_type(small: Path, tmp_path: Path) -> None:
    n_bytes = inflate(small, tmp_path / "big.gguf", 1024, 768, "Q4_K", "Q8_0")
    assert (tmp_path / "big.gguf").stat().st_size == n_bytes
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "big.gguf").tensors}
    up, q, norm = (tensors[f"blk.1.{n}.weight"] for n in ("ffn_up_exps", "attn_q", "attn_q_norm"))
    assert (up.shape.tolist(), up.tensor_type.name) == ([1024, 768, 8], "Q4_K")
    assert (q.shape.tolist(), q.tensor_type.name) == ([1024, 1024], "Q8_0")
    assert (norm.shape.tolist(), norm.tensor_type.name) == ([1024], "F32")
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"


def test_quantizing_after_inflating_loses_no_more_than_before(small: Path, tmp_path: Path) -> None:
    """A block of real numbers is encoded with or without zero blocks beside it: both are the same function."""
    for width, ff in ((256, 256), (1024, 512)):
        inflate(small, tmp_path / f"{width}.gguf", width, ff, "Q4_K", "Q8_0")
    narrow, wide = (stock_logits(tmp_path / f"{width}.gguf", TOKENS) for width in (256, 1024))
    assert np.abs(narrow - wide).max() < 0.05


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_K", "Q4_0", "Q2_K", "MXFP4", "IQ4_XS"])
def test_padded_rows_are_what_quantizing_whole_rows_gives(name: str) -> None:
    type_id = BY_NAME[name].id
    rows = np.random.default_rng(0).standard_normal((5, 200), dtype=np.float32)
    padded = np.zeros((5, 1024), np.float32)
    padded[:, :200] = rows
    encoded = encode_padded(rows, type_id, 1024)
    assert len(encoded) == 5 * row_bytes(type_id, 1024)
    found = dequantize(encoded, type_id, 1024)
    assert np.array_equal(found, dequantize(quantize(padded, type_id), type_id, 1024))
    assert not found[:, 256:].any()


def test_widths_that_do_not_fit_are_refused_with_the_numbers(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--embd 300: must be at least 256 and a multiple of 64"):
        inflate(small, tmp_path / "no.gguf", 300, 256)
    with pytest.raises(UsageError, match="--ff 128: experts have a width of 256 already"):
        inflate(small, tmp_path / "no.gguf", 512, 128)
    assert not list(tmp_path.iterdir())


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    other = write_random_model(tmp_path / "other.gguf", "qwen3moe")
    with pytest.raises(UnknownName, match="is qwen3moe; inflating is worked out for olmoe only"):
        inflate(other, tmp_path / "no.gguf", 512, 512)


def test_wrong_call_says_one_sentence_and_exits_2(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inflate_module.main([str(small), "/tmp/never.gguf", "--type", "Q4_K_M"]) == 2
    assert capsys.readouterr().err.startswith("inflate.py: 'Q4_K_M' is a mixture of types; did you mean 'Q4_K'?")
