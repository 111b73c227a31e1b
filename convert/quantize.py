"""Float rows to a ggml type and back, by ggml's own functions, from the copy of ggml that llama.cpp has loaded.

Float types (F32, F16, BF16) are converted in numpy. ctypes releases the GIL: several threads may quantize at once.
Some types have quantizers of our own, with the same bytes (native/quantize.h).
ggml aborts the process on an importance, or on values, that its grid search cannot compare; both are checked here.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from moe_edge.models.errors import BadFile, UnknownName, UsageError, WrongLibrary
from moe_edge.models.formats.floats import FloatArray, bf16_to_f32
from moe_edge.models.formats.ggml_types import (
    BF16,
    BY_NAME,
    F16,
    F32,
    FLOAT_TYPES,
    TYPES,
    GGMLType,
    find_type,
    row_bytes,
)

F16_MAX = 65504
LEAST_IMPORTANCE = 1e-6  # of a column, as a share of the mean: a group of zeros has no best scale


TARGETS = (
    "F32 F16 BF16 Q8_0 Q6_K Q5_K Q5_1 Q5_0 Q4_K Q4_1 Q4_0 IQ4_NL IQ4_XS MXFP4 Q3_K IQ3_S Q2_K TQ1_0 TQ2_0"
).split()
NEED_IMATRIX = "IQ3_XXS IQ2_XXS IQ2_XS IQ2_S IQ1_S IQ1_M".split()  # llama-quant.cpp, tensor_requires_imatrix

GRID_TYPES = frozenset(BY_NAME[name].id for name in (*NEED_IMATRIX, "IQ3_S"))  # ggml aborts when a sum overflows

FAST_LIBRARY = "libmoe_edge_quantize.so"  # x86-64 only
FAST_TYPES = ("IQ2_XXS", "IQ3_XXS", "Q2_K", "Q3_K", "Q4_K")  # with an importance
WIDEST = 16  # floats of a register, at the most

# The type to use when a row is not a multiple of the block (llama-quant.cpp, tensor_type_fallback).
FALLBACKS: Mapping[str, str] = {
    "IQ4_XS": "IQ4_NL",
    **dict.fromkeys("IQ3_S IQ3_XXS IQ2_XXS IQ2_XS IQ2_S IQ1_S IQ1_M".split(), "IQ4_NL"),
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


class _TypeTraits(ctypes.Structure):
    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("block_interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    ]


def target_type(name: str, with_imatrix: bool = False) -> GGMLType:
    """The type to quantize to, by name.

    with_imatrix: whether there is an importance for what will be quantized.
    Raises UnknownName: for a type we do not know, one that needs an importance matrix, one ggml cannot write.
    """
    entry = find_type(_plain_name(name))
    if entry.name in NEED_IMATRIX:
        if with_imatrix:
            return entry
        raise UnknownName(f"type {entry.name} needs an importance matrix (imatrix); try IQ4_XS, Q3_K or Q2_K")
    if entry.name not in TARGETS:
        raise UnknownName(f"cannot quantize to {entry.name}; known: {', '.join(TARGETS)}")
    return entry


def fitting_type(type_id: int, cols: int) -> int:
    """`type_id`, or what llama.cpp falls back to when rows of `cols` elements do not fill its blocks."""
    if cols % TYPES[type_id].block == 0:
        return type_id
    fallback = BY_NAME[FALLBACKS.get(TYPES[type_id].name, "F16")]
    return fallback.id if cols % fallback.block == 0 else F16


def quantize(rows: FloatArray, type_id: int, importance: FloatArray | None = None) -> bytes:
    """The bytes of (n_rows, n_cols) float32 rows in type `type_id`; n_cols must fill its blocks.

    importance: (n_cols,), the mean square of each column's inputs; float types ignore it.
    Raises UsageError for a type that needs an importance and has none, BadFile as check_importance does, and for
    values no type with a grid can store.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    n_rows, n_cols = rows.shape
    if type_id in FLOAT_TYPES:
        return _float_bytes(rows, type_id)
    if importance is None and TYPES[type_id].name in NEED_IMATRIX:
        raise UsageError(f"type {TYPES[type_id].name} needs the importance of {n_cols} columns, and there is none")
    weights = None if importance is None else _weights(check_importance(importance, n_cols, "importance"))
    if type_id in GRID_TYPES:
        _check_values(rows, type_id, "rows to quantize")
    if weights is not None and is_fast(type_id):
        out = ctypes.create_string_buffer(n_rows * row_bytes(type_id, n_cols))
        written = quantize_fast(rows, type_id, weights, out)
        if written != len(out):
            raise WrongLibrary(f"{FAST_LIBRARY} wrote {written} bytes of {TYPES[type_id].name}, expected {len(out)}")
        return out.raw
    return quantize_by_ggml(rows, type_id, weights)


def quantize_by_ggml(rows: FloatArray, type_id: int, weights: FloatArray | None) -> bytes:
    """ggml_quantize_chunk: rows as quantize() takes them, and weights of columns as _weights makes them."""
    n_rows, n_cols = rows.shape
    library = _prepared(type_id)
    out = ctypes.create_string_buffer(n_rows * row_bytes(type_id, n_cols))
    pointer = None if weights is None else weights.ctypes.data
    written = library.ggml_quantize_chunk(type_id, rows.ctypes.data, out, 0, n_rows, n_cols, pointer)
    if written != len(out):
        raise WrongLibrary(f"ggml_quantize_chunk wrote {written} bytes of {TYPES[type_id].name}, expected {len(out)}")
    return out.raw


def check_importance(importance: FloatArray, n_cols: int, where: str) -> FloatArray:
    """`importance` as float32. Raises BadFile, naming `where`, unless it is n_cols finite numbers, none negative."""
    values = np.ascontiguousarray(importance, np.float32)
    if values.shape != (n_cols,):
        raise BadFile(f"{where}: has shape {list(values.shape)}, expected one number for each of {n_cols} columns")
    if not np.isfinite(values).all() or (values < 0).any():
        raise BadFile(f"{where}: holds numbers that are not finite or negative, expected mean squares")
    return values


def _weights(importance: FloatArray) -> FloatArray:
    """`importance` with a mean of about 1 and no zeros; all columns alike when it is zero everywhere.

    The factor is a power of two: it changes no rounding, so the bytes are those of the unscaled importance.
    """
    mean = float(importance.mean(dtype=np.float64))
    if mean == 0:
        return np.ones_like(importance)
    factor = 2.0 ** -np.floor(np.log2(mean))
    scaled: FloatArray = np.maximum(importance.astype(np.float64) * factor, LEAST_IMPORTANCE).astype(np.float32)
    return scaled


def dequantize(data: bytes, type_id: int, n_cols: int) -> FloatArray:
    """(n_rows, n_cols) float32 from the bytes of rows of type `type_id`."""
    if type_id == F32:
        return np.frombuffer(data, "<f4").reshape(-1, n_cols)
    if type_id == F16:
        return np.frombuffer(data, "<f2").astype(np.float32).reshape(-1, n_cols)
    if type_id == BF16:
        return bf16_to_f32(np.frombuffer(data, "<u2")).reshape(-1, n_cols)
    n_rows = len(data) // row_bytes(type_id, n_cols)
    out = np.empty((n_rows, n_cols), np.float32)
    to_float = _traits(type_id).to_float
    if not to_float:
        raise UnknownName(f"ggml cannot convert {TYPES[type_id].name} to float")
    to_float(data, out.ctypes.data, n_rows * n_cols)
    return out


def requantize(
    data: bytes, source_type: int, type_id: int, n_cols: int, where: str, importance: FloatArray | None = None
) -> bytes:
    """Bytes of rows of `source_type` as rows of `type_id`. Raises BadFile, naming `where`, for NaN or infinity, and
    what quantize raises."""
    if source_type == type_id:
        return data
    rows = dequantize(data, source_type, n_cols)
    _check_values(rows, type_id, where)
    return quantize(rows, type_id, importance)


def _check_values(rows: FloatArray, type_id: int, where: str) -> None:
    largest = float(np.abs(rows).max(initial=0.0))
    if not np.isfinite(largest):
        raise BadFile(f"{where}: holds NaN or infinite values, which {TYPES[type_id].name} cannot store")
    if largest > F16_MAX and (type_id == F16 or type_id in GRID_TYPES):
        raise BadFile(
            f"{where}: holds {largest:g}, and {TYPES[type_id].name} stores at most {F16_MAX}; try BF16 or F32"
        )


def _float_bytes(rows: FloatArray, type_id: int) -> bytes:
    if type_id == F32:
        return rows.astype("<f4", copy=False).tobytes()
    if type_id == F16:
        with np.errstate(over="ignore"):
            return rows.astype("<f2").tobytes()
    bits = rows.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even, as ggml does
    nan = np.isnan(rows)
    rounded[nan] = (bits[nan] >> 16) | 64
    return rounded.astype("<u2").tobytes()


def _plain_name(name: str) -> str:
    """`Q4_K` for the mixtures llama.cpp calls `Q4_K_M`, `Q4_K_S`: never guessed, only suggested."""
    upper = name.upper()
    stem, _, size = upper.rpartition("_")
    if size in ("S", "M", "L", "XL") and stem in BY_NAME and upper not in BY_NAME:
        raise UnknownName(f"'{name}' is a mixture of types; did you mean '{stem}'? known: {', '.join(TARGETS)}")
    return name


@functools.cache
def _ggml() -> Any:
    """The ggml-base library llama.cpp loaded: by SONAME on Linux, since opening it by path loads a second copy."""
    import llama_cpp

    if sys.platform == "darwin":
        name = "libggml-base.0.dylib"
        try:
            library = ctypes.CDLL(f"@rpath/{name}")
        except OSError:
            library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / name))
    else:
        library = ctypes.CDLL("libggml-base.so.0")
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_quantize_init.restype = None
    int64, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    return library


@functools.cache
def _traits(type_id: int) -> Any:
    """ggml's description of a type. Raises WrongLibrary when it differs from ours: the library is another version."""
    traits = _ggml().ggml_get_type_traits(type_id).contents
    ours = TYPES[type_id]
    if (traits.block, traits.block_bytes) != (ours.block, ours.block_bytes):
        raise WrongLibrary(
            f"ggml says {ours.name} has {traits.block_bytes} bytes for {traits.block} elements, "
            f"expected {ours.block_bytes} for {ours.block}; install llama-cpp-python 0.3.36"
        )
    return traits


@functools.cache
def _prepared(type_id: int) -> Any:
    """The library, with the tables of `type_id` built; call it once before threads start."""
    _traits(type_id)
    library = _ggml()
    library.ggml_quantize_init(type_id)
    return library


def prepare(type_ids: set[int]) -> None:
    """Load the library and build the tables that quantizing to, or reading, these types needs."""
    for type_id in type_ids - FLOAT_TYPES:
        _prepared(type_id)
        is_fast(type_id)


PROBE_ROWS, PROBE_COLS = 16, 512


@functools.cache
def is_fast(type_id: int) -> bool:
    """Whether this processor has a quantizer of native/quantize.h for the type, and it gives ggml's bytes.

    A ggml that was built otherwise may round otherwise; then its own quantizer is used.
    """
    fast = _fast()
    if fast is None or TYPES[type_id].name not in FAST_TYPES:
        return False
    numbers = np.random.default_rng(0)
    rows = numbers.standard_normal((PROBE_ROWS, PROBE_COLS)).astype(np.float32)
    rows[::2] = np.round(2 * rows[::2]) / 4  # ties, which other roundings decide otherwise
    weights = np.ones(PROBE_COLS, np.float32)
    weights[PROBE_COLS // 2 :] = numbers.random(PROBE_COLS // 2).astype(np.float32) + np.float32(0.1)
    ours = ctypes.create_string_buffer(PROBE_ROWS * row_bytes(type_id, PROBE_COLS))
    if not quantize_fast(rows, type_id, weights, ours):
        return False
    return ours.raw == quantize_by_ggml(rows, type_id, weights)


def quantize_fast(rows: FloatArray, type_id: int, weights: FloatArray, out: Any) -> int:
    """What quantize() does, by native/quantize.h, into a ctypes buffer.

    Returns the bytes written; 0: this processor has none for the type.
    """
    fast = _fast()
    if fast is None:
        return 0
    n_rows, n_cols = rows.shape
    found = fast.meq_quantize(type_id, rows.ctypes.data, weights.ctypes.data, out, n_rows, n_cols, WIDEST)
    return int(found)


@functools.cache
def _fast() -> Any:
    """The library of native/quantize.h; None where there is none that loads. After ggml, whose tables it reads."""
    _ggml()
    import moe_edge.convert

    for folder in moe_edge.convert.__path__:
        path = Path(folder) / FAST_LIBRARY
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
            except OSError:
                return None
            int64, pointer = ctypes.c_int64, ctypes.c_void_p
            library.meq_quantize.argtypes = [ctypes.c_int32, pointer, pointer, pointer, int64, int64, ctypes.c_int32]
            library.meq_quantize.restype = int64
            return library
    return None
