"""The seam between Python and the native library: structs, counters and pieces mean the same on both sides."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import replace

import pytest
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import BadFile, WrongLibrary
from moe_edge.models.store.experts import Piece
from moe_edge.models.store.store import ExpertModel, open_model
from moe_edge.runner.capi import (
    COUNTER_NAMES,
    ERROR_BYTES,
    STRUCTS,
    CountersArray,
    check_structs,
    counter_index,
    counters_of,
    library,
)
from moe_edge.runner.native import NativeModel, _describe

SIZES = {name: ctypes.sizeof(kind) for name, kind in STRUCTS.items()}


@pytest.fixture
def model() -> ExpertModel:
    return open_model(tiny_model_path())


def with_piece(model: ExpertModel, at: int, **changed: int) -> ExpertModel:
    pieces = list(model.pieces)
    pieces[at] = pieces[at]._replace(**changed)  # type: ignore[arg-type]
    return replace(model, pieces=tuple(pieces))


def test_the_installed_library_is_of_this_version() -> None:
    library()
    check_structs(SIZES, COUNTER_NAMES)
    check_structs(SIZES, COUNTER_NAMES[::-1])  # the order is the library's own


@pytest.mark.parametrize("name", SIZES)
def test_a_struct_of_another_size_is_refused_by_name(name: str) -> None:
    with pytest.raises(WrongLibrary, match=rf"{name} of {SIZES[name] + 8} bytes, expected {SIZES[name]}.*pip install"):
        check_structs({**SIZES, name: SIZES[name] + 8}, COUNTER_NAMES)
    with pytest.raises(WrongLibrary, match=rf"{name} of 0 bytes"):
        check_structs({other: n for other, n in SIZES.items() if other != name}, COUNTER_NAMES)


def test_counters_that_one_side_lacks_are_refused_by_name() -> None:
    with pytest.raises(WrongLibrary, match="counter loads is missing"):
        check_structs(SIZES, [name for name in COUNTER_NAMES if name != "loads"])
    with pytest.raises(WrongLibrary, match="counter sighs is not known"):
        check_structs(SIZES, [*COUNTER_NAMES, "sighs"])


def test_counters_are_matched_by_name() -> None:
    index = counter_index()
    values = CountersArray()
    values[index["loads"]], values[index["stall_ns"]] = 7, 1_500_000_000
    counters = counters_of(values)
    assert (counters.loads, counters.stall_seconds, counters.steps) == (7, 1.5, 0)


def test_a_codec_that_is_not_there_is_refused_with_file_and_tensor(model: ExpertModel) -> None:
    name = model.pieces[4].name
    with pytest.raises(BadFile) as raised:
        NativeModel(with_piece(model, 4, codec=9))
    said = str(raised.value)
    assert str(model.files[0]) in said and name in said and "codec 9" in said


def test_stored_bytes_are_not_the_bytes_of_the_matrix(model: ExpertModel) -> None:
    piece = model.pieces[0]
    assert piece.stored_bytes == piece.nbytes
    assert Piece(*piece[:7], 3, 100).stored_bytes == 100 != piece.nbytes
    with pytest.raises(BadFile, match=f"raw in 100 bytes, but its matrix takes {piece.nbytes}"):
        NativeModel(with_piece(model, 0, packed_bytes=100))


@pytest.mark.parametrize(
    ("field", "value", "words"), [("codec", 5, b"codec 5"), ("stored_bytes", 64, b"raw in 64 bytes")]
)
def test_the_library_refuses_by_itself_what_python_would(
    model: ExpertModel, field: str, value: int, words: bytes
) -> None:
    desc, keep = _describe(model)
    setattr(desc.pieces[2], field, value)
    error = ctypes.create_string_buffer(ERROR_BYTES)
    assert not library().me_model_open(ctypes.byref(desc), error)
    assert words in error.value and b"blk." in error.value
    assert keep


BLAS = """
import ctypes
import llama_cpp
ggml = ctypes.CDLL("libggml.so.0")  # the copy that is loaded: its files have three names (docs/LOG.md)
ggml.ggml_backend_reg_by_name.restype = ctypes.c_void_p
ggml.ggml_backend_reg_by_name.argtypes = [ctypes.c_char_p]
NAME, COUNT = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p), ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p)

class Reg(ctypes.Structure):  # struct ggml_backend_reg of native/ggml_abi.h
    _fields_ = [("api_version", ctypes.c_int), ("name", NAME), ("count", COUNT), ("device", ctypes.c_void_p),
                ("address", ctypes.c_void_p), ("context", ctypes.c_void_p)]

blas = Reg(2, NAME(lambda reg: b"BLAS"), COUNT(lambda reg: 0))
ggml.ggml_backend_register(ctypes.byref(blas))
assert ggml.ggml_backend_reg_by_name(b"BLAS"), "registered"
from moe_edge.runner.capi import library
library()
assert not ggml.ggml_backend_reg_by_name(b"BLAS"), "still there"
assert ggml.ggml_backend_reg_by_name(b"CPU") and ggml.ggml_backend_reg_by_name(b"MOE_EDGE")
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="libraries have other names there")
def test_a_blas_backend_is_unloaded_whose_copies_of_weights_no_plan_counts() -> None:
    done = subprocess.run([sys.executable, "-c", BLAS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
