"""What the hardware allows: bytes a second from the disk by direct reads, from memory, and through ggml's products.

A probe that cannot run here returns `Unmeasured` with the reason instead of a number. Nothing is probed at import.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from moe_edge.models.errors import WrongLibrary
from moe_edge.runner.llama_package import import_llama

BLOCK_BYTES = 1 << 20
N_READERS = 4
MEMORY_BYTES = 256 << 20  # for each thread: far above any cache

BLOCKS = (1 << 20, 2 << 20, 4 << 20)
DEPTHS = (1, 2, 4, 8)
SMALL_BLOCK = 128 << 10  # the projections of very small experts; measured at depth N_READERS only
CELL_SECONDS = 0.25  # 13 cells and the sequential read: 4 s at the most, where one read does not take longer
CELL_BYTES = 96 << 20  # together 1.2 GiB and 256 MiB of sequential reads
SEQUENTIAL_BYTES = 256 << 20
SMALL_FILE_BYTES = 256 << 20  # below it the drive's and the host's own caches answer too many of the reads
TRUTH_BYTES = 4 << 20

# What an expert's products look like: rows x columns of one projection, and the rows it gets in a micro-batch of 512
# tokens, 8 of 128 experts each.
PRODUCT_ROWS, PRODUCT_COLS = 768, 2048
PREFILL_ROWS = 32
ROWS = (1, 4, 8, PREFILL_ROWS, 128)  # tokens at once, as few and as many as an expert gets in a prompt
PRODUCT_BYTES = 128 << 20
EXPERT_PRODUCTS = 16  # of a thread at least, beside which starting it takes no time


@dataclass(frozen=True)
class Unmeasured:
    """In the place of a number: why there is none."""

    why: str


@dataclass(frozen=True)
class ReadSpeed:
    """Random direct reads of one size, `depth` at a time."""

    block_bytes: int
    depth: int
    bytes_per_second: float


@dataclass(frozen=True)
class StorageSpeeds:
    """Direct reads of one file. small: the numbers are bounded by its size, caches below us answer repeated reads."""

    file_bytes: int
    sequential_bytes_per_second: float
    random: tuple[ReadSpeed, ...]
    small: bool

    def at(self, block_bytes: int, depth: int = N_READERS) -> float:
        """Bytes a second of blocks of this size, between the two nearest measured sizes by their logarithm."""
        cells = {c.block_bytes: c.bytes_per_second for c in self.random if c.depth == depth}
        below = max((b for b in cells if b <= block_bytes), default=min(cells))
        above = min((b for b in cells if b >= block_bytes), default=max(cells))
        if below == above:
            return cells[below]
        part = math.log(block_bytes / below) / math.log(above / below)
        return cells[below] + part * (cells[above] - cells[below])


@dataclass(frozen=True)
class DirectReads:
    """Whether a direct read leaves the page cache alone; method: "mincore" or "speed"; detail: what was seen."""

    bypass: bool
    method: str
    detail: str


@dataclass(frozen=True)
class ProductSpeeds:
    """Products of quantized weights by ggml's CPU backend, from memory beyond the caches.

    decode_bytes_per_second: bytes of weights multiplied by one token. prefill_bytes_per_second: bytes of weights
    times tokens, for PREFILL_ROWS tokens at once. rows: (tokens at once, the same for so many), for each of ROWS.
    expert_rows: likewise for experts, whose products of several rows are ours for many types (native/few_rows.h).
    """

    type_id: int
    n_threads: int
    decode_bytes_per_second: float
    prefill_bytes_per_second: float
    rows: list[list[float]]
    expert_rows: list[list[float]]


UNPACK_REPEATS = 8

# ---- storage -----------------------------------------------------------------------------------------------


def disk_bytes_per_second(path: Path, seconds: float = 2.0) -> float | None:
    """Direct reads of 1 MiB blocks of the file in random order, 4 at a time; None where they do not work."""
    try:
        with open_direct(path) as fd:
            return random_reads(fd, path.stat().st_size, BLOCK_BYTES, N_READERS, seconds) or None
    except OSError:
        return None


@contextlib.contextmanager
def open_direct(path: Path) -> Iterator[int]:
    """A file descriptor whose reads ask to bypass the page cache. Raises OSError where there is no such thing."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag and sys.platform != "darwin":
        raise OSError(0, "this system has no direct reads")
    fd = os.open(path, os.O_RDONLY | flag)
    try:
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
        yield fd
    finally:
        os.close(fd)


def storage_speeds(
    path: Path, *, cell_seconds: float = CELL_SECONDS, cell_bytes: int = CELL_BYTES
) -> StorageSpeeds | Unmeasured:
    """Sequential and random direct reads of the file: every size of BLOCKS at every depth of DEPTHS that it allows."""
    size = path.stat().st_size
    if size < BLOCK_BYTES:
        return Unmeasured(f"{path} has {size} bytes; a probe needs at least {BLOCK_BYTES}")
    limit = min(cell_bytes, 4 * size)
    try:
        with open_direct(path) as fd:
            sequential = _sequential_reads(fd, size, 2 * cell_seconds, min(SEQUENTIAL_BYTES, 4 * limit))
            cells = [
                ReadSpeed(block, depth, random_reads(fd, size, block, depth, cell_seconds, limit, seed=block + depth))
                for block in BLOCKS
                if block * 2 <= size or block == BLOCK_BYTES
                for depth in DEPTHS
            ]
            small = random_reads(fd, size, SMALL_BLOCK, N_READERS, cell_seconds, limit)
            cells.insert(0, ReadSpeed(SMALL_BLOCK, N_READERS, small))
    except OSError as e:
        return Unmeasured(f"direct reads of {path} fail: {e.strerror or e}")
    return StorageSpeeds(size, sequential, tuple(cells), size < SMALL_FILE_BYTES)


def random_reads(
    fd: int, file_bytes: int, block_bytes: int, depth: int, seconds: float, max_bytes: int = 1 << 62, seed: int = 0
) -> float:
    """Bytes a second of blocks in random order, by `depth` threads, until the time or the bytes are used up.

    0 for a file smaller than a block. Raises OSError when a read fails.
    """
    n_blocks = file_bytes // block_bytes
    order = list(range(n_blocks))
    random.Random(seed).shuffle(order)
    done = [0] * depth
    errors: list[OSError] = []
    started = time.perf_counter()

    def read(number: int) -> None:
        with mmap.mmap(-1, block_bytes) as buffer:  # aligned to a page, as direct reads need it
            at = number
            while done[number] * depth < max_bytes and (not done[number] or time.perf_counter() - started < seconds):
                try:
                    done[number] += _read_into(fd, buffer, order[at % n_blocks] * block_bytes)
                except OSError as e:  # the file system refuses direct reads only now
                    errors.append(e)
                    return
                at += depth

    if n_blocks == 0:
        return 0.0
    _run_together([lambda n=n: read(n) for n in range(depth)])  # type: ignore[misc]
    if errors:
        raise errors[0]
    return sum(done) / (time.perf_counter() - started)


def _sequential_reads(fd: int, file_bytes: int, seconds: float, max_bytes: int) -> float:
    block_bytes = min(BLOCKS[-1], file_bytes // BLOCK_BYTES * BLOCK_BYTES)
    done = 0
    with mmap.mmap(-1, block_bytes) as buffer:
        started = time.perf_counter()
        while done < max_bytes and (not done or time.perf_counter() - started < seconds):
            done += _read_into(fd, buffer, done // block_bytes % (file_bytes // block_bytes) * block_bytes)
        return done / (time.perf_counter() - started)


def _read_into(fd: int, buffer: mmap.mmap, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    return len(os.pread(fd, len(buffer), offset))  # F_NOCACHE wants no alignment


def direct_reads(path: Path) -> DirectReads | Unmeasured:
    """Whether direct reads of the file really bypass the page cache: some accept the flag and ignore it.

    On Linux mincore() counts cached pages of 4 MiB of the file before and after a direct read of them. Where that
    says nothing, by speed: a direct read again against a cached read again.
    """
    size = path.stat().st_size
    if size < BLOCK_BYTES:
        return Unmeasured(f"{path} has {size} bytes; the test needs at least {BLOCK_BYTES}")
    length = min(TRUTH_BYTES, size // BLOCK_BYTES * BLOCK_BYTES)
    start = (size - length) // 2 // BLOCK_BYTES * BLOCK_BYTES
    try:
        with open_direct(path) as direct, open(path, "rb", buffering=0) as plain:
            by_pages = _truth_by_mincore(direct, plain.fileno(), start, length)
            return by_pages or _truth_by_speed(direct, plain.fileno(), start, length)
    except OSError as e:
        return Unmeasured(f"direct reads of {path} fail: {e.strerror or e}")


def _truth_by_mincore(direct: int, plain: int, start: int, length: int) -> DirectReads | None:
    """None where mincore() cannot tell: not Linux, or it shows all pages cached whatever is done."""
    if not hasattr(os, "posix_fadvise"):
        return None
    os.posix_fadvise(plain, start, length, os.POSIX_FADV_DONTNEED)
    before = cached_pages(plain, start, length)
    n_pages = length // mmap.PAGESIZE
    if before is None or before == n_pages:  # in use elsewhere, or hidden from us (Linux 5.2: files of others)
        return None
    _read_range(direct, start, length)
    after = cached_pages(plain, start, length) or 0
    detail = f"{before} of {n_pages} pages were cached before a direct read of them, {after} after it"
    return DirectReads(after - before < n_pages // 16 + 1, "mincore", detail)


def _truth_by_speed(direct: int, plain: int, start: int, length: int) -> DirectReads:
    seconds = []
    for fd in (plain, direct):
        _read_range(fd, start, length)
        began = time.perf_counter()
        for _ in range(3):
            _read_range(fd, start, length)
        seconds.append((time.perf_counter() - began) / 3)
    cached, again = (length / s / 1e6 for s in seconds)
    detail = f"reading again gives {again:.0f} MB/s directly and {cached:.0f} MB/s from the page cache"
    return DirectReads(again < 0.7 * cached, "speed", detail)


def _read_range(fd: int, start: int, length: int) -> None:
    with mmap.mmap(-1, BLOCK_BYTES) as buffer:
        for at in range(start, start + length, BLOCK_BYTES):
            _read_into(fd, buffer, at)


def cached_pages(fd: int, start: int, length: int) -> int | None:
    """Pages of a range of the file that are in the page cache; None where Linux's mincore() is not to be had.

    start: a multiple of the page size.
    """
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, start)
    if address in (None, ctypes.c_void_p(-1).value):
        return None
    try:
        flags = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
        if libc.mincore(address, length, flags) != 0:
            return None
        return sum(page & 1 for page in flags.raw[: -(-length // mmap.PAGESIZE)])
    finally:
        libc.munmap(address, length)


# ---- memory and products -----------------------------------------------------------------------------------


def memory_bytes_per_second(n_threads: int, repeats: int = 3, nbytes: int = MEMORY_BYTES) -> float:
    """Reading 256 MiB with each thread: numpy's sum of integers, the best of several runs."""
    import numpy as np

    arrays = [np.ones(nbytes // 8, np.int64) for _ in range(n_threads)]
    best = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        _run_together([array.sum for array in arrays])
        best = max(best, n_threads * nbytes / (time.perf_counter() - started))
    return best


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def product_speeds(type_id: int, n_threads: int, nbytes: int = PRODUCT_BYTES) -> ProductSpeeds | Unmeasured:
    """Time ggml's own products over `nbytes` of weights of this type, for one token, and over a part for more tokens.

    The same kernels and threads as a decode, on matrices of an expert's size, one after the other. Uses the public
    functions of ggml.h and ggml-cpu.h only. Takes about a second, and nbytes of memory until it returns.
    """
    try:
        base, cpu = _ggml_libraries()
    except (OSError, WrongLibrary) as e:
        return Unmeasured(f"ggml's libraries cannot be used directly: {e}")
    row = int(base.ggml_row_size(type_id, PRODUCT_COLS))
    n_matrices = max(1, nbytes // (row * PRODUCT_ROWS))
    some = max(1, n_matrices // 8)  # of them, for many tokens: those wait for arithmetic, not for memory
    outputs = n_matrices + some * (sum(ROWS) - 1)
    space = n_matrices * row * PRODUCT_ROWS + outputs * (PRODUCT_ROWS * 4 + 1024) + (64 << 20)
    context = base.ggml_init(_InitParams(space, None, False))
    if not context:
        return Unmeasured(f"no room for {space} bytes of weights")
    try:
        weights = [base.ggml_new_tensor_2d(context, type_id, PRODUCT_COLS, PRODUCT_ROWS) for _ in range(n_matrices)]
        _fill(base, weights, type_id, row * PRODUCT_ROWS)
        rates, of_experts = [], []
        for n_tokens in ROWS:
            used, repeats = (weights, 8) if n_tokens == 1 else (weights[:some], 3)
            seconds = _time_products(base, cpu, context, used, n_tokens, n_threads, repeats) / len(used)
            data = [int(base.ggml_get_data(each)) for each in used]
            ours = _time_expert_products(data, type_id, n_tokens, n_threads, repeats)
            rates.append([n_tokens, row * PRODUCT_ROWS * n_tokens / seconds])
            of_experts.append([n_tokens, row * PRODUCT_ROWS * n_tokens / (ours or seconds)])
    finally:
        base.ggml_free(context)
    by_rows = dict(zip(ROWS, (rate for _, rate in rates), strict=True))
    return ProductSpeeds(type_id, n_threads, by_rows[1], by_rows[PREFILL_ROWS], rates, of_experts)


def _time_expert_products(
    matrices: Sequence[int], type_id: int, n_tokens: int, n_threads: int, repeats: int
) -> float | None:
    """Seconds of one product with n_tokens rows, as experts have them; None where those are ggml's.

    Each thread has as many matrices as any other, as threads that share experts out have nearly.
    """
    from moe_edge.runner.capi import library

    multiply = library().me_multiply_rows
    rows = ctypes.create_string_buffer(n_tokens * PRODUCT_COLS * 4)  # zeros, in any type that products take
    outputs = [ctypes.create_string_buffer(n_tokens * PRODUCT_ROWS * 4) for _ in range(n_threads)]

    def one(matrix: int, out: ctypes.Array[ctypes.c_char]) -> bool:
        return bool(multiply(type_id, PRODUCT_COLS, PRODUCT_ROWS, matrix, rows, n_tokens, out) == 0)

    each = max(EXPERT_PRODUCTS, len(matrices) // n_threads)

    def job(thread: int) -> None:
        for i in range(each):
            one(matrices[(thread * each + i) % len(matrices)], outputs[thread])

    if not one(matrices[0], outputs[0]):
        return None
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        _run_together([lambda thread=thread: job(thread) for thread in range(n_threads)])  # type: ignore[misc]
        best = min(best, time.perf_counter() - started)
    return best / (each * n_threads)


def _words(weights: Any, type_id: int) -> bytes:
    """float32 values as F16 or BF16 (cut, not rounded)."""
    import numpy as np
    from moe_edge.models.formats.ggml_types import F16

    if type_id == F16:
        return bytes(weights.astype("<f2").tobytes())
    return bytes((weights.view(np.uint32) >> 16).astype("<u2").tobytes())


@lru_cache(maxsize=8)
def unpack_bytes_per_second(type_id: int, codec: int, n_threads: int, nbytes: int = 2 << 20) -> float:
    """How fast experts of this type and codec are unpacked by n_threads together, in bytes of the matrix.

    Unpacks `nbytes` of Gaussian weights some ten times in each thread; takes about 0.1 s.
    """
    import numpy as np
    from moe_edge.models.formats.ggml_types import BF16, F16, TYPES
    from moe_edge.models.store.planes import pack
    from moe_edge.runner.capi import library
    from moe_edge.runner.zstd import zstd_functions

    lib = library()
    lib.me_set_zstd(*zstd_functions())
    drawn, block_bytes = np.random.default_rng(1), TYPES[type_id].block_bytes
    if type_id in (F16, BF16):
        weights = drawn.normal(0, 0.02, nbytes // 2).astype(np.float32)
        raw = _words(weights, type_id)
    else:  # bytes as uneven as quants are
        quants = drawn.normal(128, 45, nbytes // block_bytes * block_bytes)
        raw = np.clip(quants, 0, 255).astype(np.uint8).tobytes()
    packed = pack(raw, type_id, codec)

    def job() -> None:
        out, error = ctypes.create_string_buffer(len(raw)), ctypes.create_string_buffer(1024)
        for _ in range(UNPACK_REPEATS):
            lib.me_unpack(packed, len(packed), codec, type_id, out, len(raw), error)

    job()
    started = time.perf_counter()
    _run_together([job] * n_threads)
    return n_threads * UNPACK_REPEATS * len(raw) / (time.perf_counter() - started)


def _time_products(
    base: Any, cpu: Any, context: Any, weights: Sequence[Any], n_tokens: int, n_threads: int, repeats: int
) -> float:
    """Seconds of all products with n_tokens columns: the best of several runs, after one that is not counted."""
    tokens = base.ggml_new_tensor_2d(context, 0, PRODUCT_COLS, n_tokens)
    values = (ctypes.c_float * (PRODUCT_COLS * n_tokens))(*([0.5, -0.25, 1.0, 0.75] * (PRODUCT_COLS * n_tokens // 4)))
    ctypes.memmove(base.ggml_get_data(tokens), values, ctypes.sizeof(values))
    graph = base.ggml_new_graph_custom(context, 2 * len(weights) + 8, False)
    for each in weights:
        base.ggml_build_forward_expand(graph, base.ggml_mul_mat(context, each, tokens))
    best = float("inf")
    for run in range(repeats + 1):
        started = time.perf_counter()
        if cpu.ggml_graph_compute_with_ctx(context, graph, n_threads) != 0:
            raise OSError("ggml could not compute its products")
        if run:
            best = min(best, time.perf_counter() - started)
    return best


def _fill(base: Any, weights: Sequence[Any], type_id: int, nbytes: int) -> None:
    """Random weights, quantized by ggml once and copied into every matrix."""
    values = [random.Random(0).gauss(0, 1) for _ in range(PRODUCT_COLS)]
    row = (ctypes.c_float * PRODUCT_COLS)(*values)
    importance = (ctypes.c_float * PRODUCT_COLS)(*[1.0] * PRODUCT_COLS)
    one = ctypes.create_string_buffer(nbytes // PRODUCT_ROWS)
    base.ggml_quantize_chunk(type_id, row, one, 0, 1, PRODUCT_COLS, importance)
    matrix = one.raw[: nbytes // PRODUCT_ROWS] * PRODUCT_ROWS
    for each in weights:
        ctypes.memmove(base.ggml_get_data(each), matrix, nbytes)


def _ggml_libraries() -> tuple[Any, Any]:
    """(ggml-base, ggml-cpu) as llama_cpp has loaded them.

    Raises OSError when they are not there by these names, WrongLibrary when llama_cpp cannot be loaded.
    """
    import_llama()
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    libraries = []
    for name in ("ggml-base", "ggml-cpu"):
        # Linux: by SONAME, since a path might load a second copy
        on_mac = sys.platform == "darwin"
        libraries.append(ctypes.CDLL(str(folder / f"lib{name}.0.dylib") if on_mac else f"lib{name}.so.0"))
    base, cpu = libraries
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_init": (pointer, [_InitParams]),
        "ggml_free": (None, [pointer]),
        "ggml_row_size": (ctypes.c_size_t, [number, size]),
        "ggml_new_tensor_2d": (pointer, [pointer, number, size, size]),
        "ggml_get_data": (pointer, [pointer]),
        "ggml_quantize_chunk": (ctypes.c_size_t, [number, pointer, pointer, size, size, size, pointer]),
        "ggml_mul_mat": (pointer, [pointer, pointer, pointer]),
        "ggml_new_graph_custom": (pointer, [pointer, ctypes.c_size_t, ctypes.c_bool]),
        "ggml_build_forward_expand": (None, [pointer, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        f = getattr(base, name)
        f.restype, f.argtypes = result, arguments
    compute = cpu.ggml_graph_compute_with_ctx
    compute.restype, compute.argtypes = number, [pointer, pointer, number]
    return base, cpu


def _run_together(jobs: Sequence[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
