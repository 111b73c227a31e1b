"""One test for each clause of the safetensors format that a damaged file can break."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_edge.models.errors import BadFile, BadMagic, CutFile, MissingFile, MoeEdgeError, UnknownName
from moe_edge.models.formats.safetensors import INDEX_NAME, open_safetensors, read_safetensors


def to_bf16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 values that bfloat16 holds exactly, or else truncated."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, np.ndarray]]) -> Path:
    """tensors: name -> (dtype, array whose bytes are stored; uint16 for BF16)."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, array) in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        described[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return write_raw(path, json.dumps(described).encode(), data)


def write_raw(path: Path, header: bytes, data: bytes) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


VALUES = np.array([[1.0, -2.5, 0.0], [0.15625, 3e30, -1e-30]], np.float32)


def test_tensors_read_as_float32(tmp_path: Path) -> None:
    exact = np.array([1.0, -2.5, 0.15625], np.float32)
    write_safetensors(
        tmp_path / "model.safetensors",
        {"a": ("F32", VALUES), "b": ("BF16", to_bf16(exact)), "c": ("F16", exact.astype(np.float16))},
    )
    checkpoint = open_safetensors(tmp_path)
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert np.array_equal(checkpoint.read("a"), VALUES)
    assert np.array_equal(checkpoint.read("b"), exact) and checkpoint.read("b").dtype == np.float32
    assert np.array_equal(checkpoint.read("c"), exact)
    assert checkpoint.read_raw("b") == to_bf16(exact).tobytes()


def test_dtype_that_is_not_a_float_is_refused_when_read(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"ids": ("I64", np.arange(3))})
    with pytest.raises(UnknownName, match="'ids' is I64"):
        open_safetensors(tmp_path).read("ids")
    with pytest.raises(UnknownName, match="'ids' is I64"):
        open_safetensors(tmp_path).tensors["ids"].entry("ids")


def described(**changes: Any) -> bytes:
    return json.dumps({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}).encode()


@pytest.mark.parametrize(
    ("header", "data", "error", "says"),
    [
        (b"[]", b"", BadFile, "is a JSON list"),
        (b"{", b"", BadFile, "not valid JSON"),
        (b'{"\xff": 1}', b"", BadFile, "not valid JSON"),
        (b"[" * 100_000, b"", BadFile, "not valid JSON"),
        (b'{"t": 1, "t": 2}', b"", BadFile, "'t' appears twice"),
        (b'{"t": 1}', b"", BadFile, "'t' is described by 1"),
        (described(dtype="F33"), bytes(8), BadFile, "unknown dtype 'F33'"),
        (described(dtype=[]), bytes(8), BadFile, "unknown dtype"),
        (described(shape=[-2]), bytes(8), BadFile, "shape [-2]"),
        (described(shape="2"), bytes(8), BadFile, "shape '2'"),
        (described(shape=[True, 2]), bytes(8), BadFile, "shape [True, 2]"),
        (described(shape=[3]), bytes(8), BadFile, "needs 12 bytes, found 8"),
        (described(shape=[1 << 62, 1 << 62]), bytes(8), BadFile, "found 8"),
        (described(data_offsets=[8, 0]), bytes(8), BadFile, "data_offsets [8, 0]"),
        (described(data_offsets=[0]), bytes(8), BadFile, "data_offsets [0]"),
        (described(), bytes(7), CutFile, "'t' needs bytes"),
        (described(), bytes(9), BadFile, "but the file at"),
        (described(data_offsets=[4, 12]), bytes(12), BadFile, "leaves a hole"),
        (b"{}", b"x", BadFile, "but the file at"),
    ],
)
def test_malformed_file_is_refused(
    tmp_path: Path, header: bytes, data: bytes, error: type[MoeEdgeError], says: str
) -> None:
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(error) as caught:
        read_safetensors(path)
    assert type(caught.value) is error
    assert says in str(caught.value) and "bad.safetensors" in str(caught.value)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    two = {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}
    path = write_raw(tmp_path / "bad.safetensors", json.dumps({"a": one, "b": two}).encode(), bytes(12))
    with pytest.raises(BadFile, match=r"'b' starts at byte .* overlaps"):
        read_safetensors(path)


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (b"", BadMagic, "it has 0 bytes"),
        (b"GGUF", BadMagic, "it has 4 bytes"),
        (struct.pack("<Q", 100_000_001), BadMagic, "its header would be 100000001 bytes"),
        (struct.pack("<Q", 50) + b"{}", CutFile, "needs bytes 8-58"),
    ],
)
def test_wrong_header_length_is_refused(tmp_path: Path, data: bytes, error: type[MoeEdgeError], says: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(error, match=says):
        read_safetensors(path)


def write_indexed(folder: Path) -> dict[str, str]:
    weight_map = {}
    for part in (1, 2):
        name = f"model-0000{part}-of-00002.safetensors"
        write_safetensors(folder / name, {f"t{part}": ("F32", VALUES * part)})
        weight_map[f"t{part}"] = name
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_indexed_checkpoint_is_read(tmp_path: Path) -> None:
    write_indexed(tmp_path)
    checkpoint = open_safetensors(tmp_path)
    assert len(checkpoint.files) == len(checkpoint.headers) == 2
    assert np.array_equal(checkpoint.read("t2"), VALUES * 2)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"neither model.safetensors.index.json nor model.safetensors"):
        open_safetensors(tmp_path)
    weight_map = write_indexed(tmp_path)
    (tmp_path / weight_map["t2"]).unlink()
    with pytest.raises(MissingFile, match=r"1 of 2 files missing .*model-00002-of-00002"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"t3": "model-00001-of-00002.safetensors"}, "'t3' is not in"),
        ({"t2": "model-00001-of-00002.safetensors"}, "'t2' should be in"),
        ({"t1": "../model.safetensors"}, "outside its folder"),
    ],
)
def test_index_that_disagrees_is_refused(tmp_path: Path, change: dict[str, str], says: str) -> None:
    weight_map = write_indexed(tmp_path) | change
    if "t2" in change:
        weight_map["t9"] = "model-00002-of-00002.safetensors"
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BadFile, match=says):
        open_safetensors(tmp_path)


def test_index_without_a_map_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text("{}")
    with pytest.raises(BadFile, match="no 'weight_map'"):
        open_safetensors(tmp_path)
