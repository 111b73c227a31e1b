"""Tensors converted to their planned types, a bounded piece at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

from moe_edge.models.formats.ggml_types import row_bytes
from moe_edge.models.formats.source_files import SourceFiles
from moe_edge.models.store.planes import pack

if TYPE_CHECKING:
    from moe_edge.convert.conversion_plan import PlannedTensor
    from moe_edge.models.formats.floats import FloatArray

CHUNK_ELEMENTS = 2 << 20  # to convert at a time: 8 MiB as float32


def converted(
    tensors: Iterable[PlannedTensor],
    files: SourceFiles,
    threads: int,
    importance: Mapping[str, FloatArray] | None = None,
) -> Generator[bytes, None, None]:
    """The bytes of all tensors in order, each converted to its planned type, in pieces that never span two tensors.

    importance: planned name -> (n_cols,), for the quantizer; tensors without one are quantized without.
    Works on a few pieces at a time in `threads` threads, so memory is bounded whatever the size of the tensors:
    about 30 MiB for each thread. Close the generator before `files`.
    Raises CutFile, MissingFile, BadFile for values a type cannot store.
    """
    from moe_edge.convert.quantize import prepare  # numpy: not for the runtime, which only copies

    tensors = tuple(tensors)
    weights = importance or {}
    prepare({each for tensor in tensors for each in (tensor.type, tensor.source.type) if tensor.is_converted})
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[bytes]] = deque()
        for tensor, start, nbytes in _row_ranges(tensors):
            files.open(tensor.source.path)
            task = pool.submit(_convert_rows, tensor, files, start, nbytes, weights.get(tensor.name))
            waiting.append(task)
            if len(waiting) > threads + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def packed(
    tensors: Sequence[PlannedTensor], pieces: Generator[bytes, None, None], threads: int
) -> Generator[tuple[bytes, bool], None, None]:
    """The pieces of `converted`, each with whether it ends its tensor; a tensor to be packed comes whole and packed.

    Packs a few tensors at a time, so memory is bounded by some `threads` of them. Closes `pieces`.
    """
    with ThreadPoolExecutor(threads) as pool, closing(pieces):
        waiting: deque[tuple[Future[bytes] | bytes, bool]] = deque()
        for tensor in tensors:
            left, whole = tensor.nbytes, bytearray()
            while left:
                piece = next(pieces)
                left -= len(piece)
                if not tensor.packed:
                    waiting.append((piece, not left))
                    continue
                whole += piece
            if tensor.packed:
                waiting.append((pool.submit(pack, bytes(whole), tensor.type, tensor.codec), True))
            while len(waiting) > threads + 1:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())


def _result(piece: Future[bytes] | bytes, ends: bool) -> tuple[bytes, bool]:
    return piece if isinstance(piece, bytes) else piece.result(), ends


def _row_ranges(tensors: Iterable[PlannedTensor]) -> Iterator[tuple[PlannedTensor, int, int]]:
    """(tensor, first byte, bytes) of pieces of whole rows, in the source's type."""
    for tensor in tensors:
        bytes_per_row = row_bytes(tensor.source.type, tensor.source.shape[0])
        step = max(1, CHUNK_ELEMENTS // tensor.source.shape[0]) * bytes_per_row
        for start in range(0, tensor.source.nbytes, step):
            yield tensor, start, min(step, tensor.source.nbytes - start)


def _convert_rows(
    tensor: PlannedTensor, files: SourceFiles, start: int, nbytes: int, importance: FloatArray | None
) -> bytes:
    from moe_edge.convert.quantize import requantize

    source = tensor.source
    data = files.read(source, start, nbytes)
    where = f"{source.path}: tensor '{source.name}'"
    return requantize(data, source.type, tensor.type, source.shape[0], where, importance)
