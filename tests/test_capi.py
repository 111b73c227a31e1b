"""The seam between Python and the native library: structs, counters and pieces mean the same on both sides."""

from __future__ import annotations

import ctypes
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
