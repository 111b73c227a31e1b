"""The numbers of the random models: drawn a chunk at a time, and encoded by ggml itself."""

from __future__ import annotations

import ctypes
import functools
import math
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
ByteArray = NDArray[np.uint8]

CHUNK_VALUES = 1 << 22  # values made at a time: 16 MiB as F32
SAMPLE_VALUES = 1 << 18  # values of one sample block of a tiled tensor
N_SAMPLES = 16


@dataclass(frozen=True)
class RandomTensor:
    """One tensor to write: normal numbers around `mean`.

    dims: in numpy order, (n_expert, n_out, n_in). sources: the names its numbers are drawn by, stacked along
    n_out; by default its own. row_scale: (n_out,), multiplies the rows.
    """

    name: str
    dims: tuple[int, ...]
    type_name: str
    std: float
    mean: float = 0.0
    sources: tuple[str, ...] = ()
    row_scale: FloatArray | None = None

    @property
    def ggml_type(self) -> gguf.GGMLQuantizationType:
        return gguf.GGMLQuantizationType[self.type_name]

    @property
    def n_bytes(self) -> int:
        return row_bytes(self.type_name, self.dims[-1]) * math.prod(self.dims[:-1])


def row_bytes(type_name: str, row_len: int) -> int:
    """Bytes of one row of row_len values in this ggml type."""
    sizes: tuple[int, int] = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    block, block_bytes = sizes
    assert row_len % block == 0
    return row_len // block * block_bytes


def fitting_type(type_name: str, row_len: int) -> str:
    """The type itself, or Q8_0, or F16: the first whose block divides row_len."""
    for name in (type_name, "Q8_0"):
        if row_len % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0] == 0:
            return name
    return "F16"


def quantize(values: FloatArray, type_name: str) -> ByteArray:
    """Rows in ggml's own encoding.

    values: (n_rows, row_len). Returns (n_rows, row_bytes), owned by the caller.
    Types that need an importance matrix (IQ1_S, IQ2_XXS, IQ2_XS) get a flat one.
    """
    values = np.ascontiguousarray(values, np.float32)
    n_rows, row_len = values.shape
    type_id = int(gguf.GGMLQuantizationType[type_name])
    encoded = np.empty((n_rows, row_bytes(type_name, row_len)), np.uint8)
    ggml = _ggml_base()
    flat = np.ones(row_len, np.float32)
    importance = flat.ctypes.data if ggml.ggml_quantize_requires_imatrix(type_id) else None
    ggml.ggml_quantize_chunk(type_id, values.ctypes.data, encoded.ctypes.data, 0, n_rows, row_len, importance)
    return encoded


@functools.cache
def _ggml_base() -> ctypes.CDLL:
    import llama_cpp

    if sys.platform == "linux":
        ggml = ctypes.CDLL("libggml-base.so.0")  # by SONAME: a path would load a second copy
    else:  # quantizing needs no backend registry, so a second copy does no harm
        folder = Path(llama_cpp.__file__).parent / "lib"
        ggml = ctypes.CDLL(str(next(p for p in sorted(folder.iterdir()) if "ggml-base" in p.name)))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    return ggml


# ---- numbers -----------------------------------------------------------------------------------------------


def stream_tensors(writer: gguf.GGUFWriter, tensors: dict[str, RandomTensor], seed: int, tile: bool) -> None:
    """Write the tensors a chunk at a time; GGUFWriter's own functions hold a whole tensor in memory."""
    samples: dict[tuple[object, ...], ByteArray] = {}
    assert writer.fout is not None
    for file, infos in zip(writer.fout, writer.tensors, strict=True):
        writer.write_padding(file, file.tell())
        for name in infos:
            tensor = tensors[name]
            tiled = tile and len(tensor.dims) == 3
            chunks = _tiled_chunks(tensor, seed, samples) if tiled else _chunks(tensor, seed)
            n_written = 0
            for chunk in chunks:
                n_written += file.write(chunk.data)
            assert n_written == tensor.n_bytes
            writer.write_padding(file, n_written)


def _chunks(tensor: RandomTensor, seed: int) -> Iterator[ByteArray]:
    """The encoded rows of a tensor, at most CHUNK_VALUES values at a time."""
    sources = tensor.sources or (tensor.name,)
    row_len = tensor.dims[-1]
    n_experts = math.prod(tensor.dims[:-2])
    n_rows = tensor.dims[-2] // len(sources) if len(tensor.dims) > 1 else 1
    step = max(1, CHUNK_VALUES // row_len)
    for expert in range(n_experts):
        for source in sources:
            rng = _rng(seed, source, expert)
            for first in range(0, n_rows, step):
                values = rng.standard_normal((min(step, n_rows - first), row_len), dtype=np.float32)
                values = values * np.float32(tensor.std) + np.float32(tensor.mean)
                if tensor.row_scale is not None:
                    values *= tensor.row_scale[first : first + step, None]
                yield quantize(values, tensor.type_name)


def _tiled_chunks(
    tensor: RandomTensor, seed: int, samples: dict[tuple[object, ...], ByteArray]
) -> Iterator[ByteArray]:
    """The slabs of a stacked tensor, each put together at random from N_SAMPLES blocks of rows.

    samples: blocks made so far, (N_SAMPLES, block_bytes) by kind of tensor; added to.
    """
    n_experts, n_rows, row_len = tensor.dims
    block_rows = _largest_divisor(n_rows, max(1, min(n_rows // 8, SAMPLE_VALUES // row_len)))
    kind = tensor.name.split(".")[2]
    key = (kind, block_rows, row_len, tensor.type_name, tensor.std)
    if key not in samples:
        one = replace(tensor, name=kind, dims=(N_SAMPLES, block_rows, row_len), sources=())
        samples[key] = np.stack([block.reshape(-1) for block in _chunks(one, seed)])
    for expert in range(n_experts):
        order = _rng(seed, tensor.name, expert).integers(0, N_SAMPLES, n_rows // block_rows)
        yield samples[key][order]


def _rng(seed: int, name: str, part: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode()), part])


def _largest_divisor(n: int, limit: int) -> int:
    return next(d for d in range(limit, 0, -1) if n % d == 0)
