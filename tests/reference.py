"""Logits of stock llama.cpp, the reference our engine is measured against.

Uses the ctypes layer of llama-cpp-python, because `Llama` has no argument for `use_extra_bufts`: with it
llama.cpp repacks weights, and on the machine these tests were made on it dies in AMX code. So AMX is left out
where dense weights are repacked, and experts are kept as they are, which is moe-edge's setting.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from moe_edge.runner.dense_repack import only_repack, repacks
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


def stock_logits(
    path: str | os.PathLike[str],
    tokens: Sequence[int],
    n_ubatch: int = 512,
    n_threads: int = 2,
    all_positions: bool = True,
    *,
    flash_attention: bool = False,
    n_batch: int | None = None,
    n_ctx: int | None = None,
    repack: str = "auto",
    repack_experts: bool = False,
) -> FloatArray:
    """Logits after each of the tokens, or after the last, from stock llama.cpp on the CPU.

    n_batch: tokens given to one llama_decode, default n_ubatch. n_ctx: default, room for the tokens.
    repack, repack_experts: see stock_model().
    Returns (n_tokens, n_vocab), or (1, n_vocab) without all_positions; owned by the caller.
    Raises RuntimeError if llama.cpp refuses the model or fails in a decode; some bad models end the process.
    """
    n_batch = max(n_batch or 0, n_ubatch)
    with (
        stock_model(path, repack, repack_experts) as model,
        stock_context(
            model,
            n_ctx=n_ctx or max(256, len(tokens)),
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_threads=n_threads,
            flash_attention=flash_attention,
        ) as ctx,
    ):
        return logits_of_context(ctx, model, tokens, n_batch, all_positions)


class _Override(ctypes.Structure):  # llama_model_tensor_buft_override
    _fields_ = [("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p)]


_Overrides = _Override * 2


def _plain_buffers() -> int:
    """A buffer type of ordinary memory that is not the CPU's own, for which llama.cpp would take repacked ones."""
    suffix = "0.dylib" if sys.platform == "darwin" else "so.0"
    ggml = ctypes.CDLL(str(Path(llama_cpp.llama_cpp._lib._name).parent / f"libggml-base.{suffix}"))
    ggml.ggml_backend_cpu_buffer_from_ptr.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    for name in ("ggml_backend_cpu_buffer_from_ptr", "ggml_backend_buffer_get_type"):
        getattr(ggml, name).restype = ctypes.c_void_p
    ggml.ggml_backend_buffer_get_type.argtypes = ggml.ggml_backend_buffer_free.argtypes = [ctypes.c_void_p]
    memory = ctypes.create_string_buffer(128)
    aligned = -(-ctypes.addressof(memory) // 64) * 64
    buffer = ggml.ggml_backend_cpu_buffer_from_ptr(aligned, 64)
    kind = ggml.ggml_backend_buffer_get_type(buffer)
    ggml.ggml_backend_buffer_free(buffer)
    return int(kind)


@contextmanager
def stock_model(path: str | os.PathLike[str], repack: str = "auto", repack_experts: bool = False) -> Iterator[Any]:
    """A llama_model read into memory (no mmap), on the CPU; freed at the end.

    repack: whether dense weights are repacked, auto, on or off as in moe-edge's own option. repack_experts: experts
    too, as llama.cpp does by itself.
    """
    llama_cpp.llama_backend_init()
    repacking = repacks(repack)
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = repacking
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    kept = _Overrides(_Override(rb"ffn_(up|gate|down|gate_up)_exps", _plain_buffers()), _Override(None, None))
    if repacking and not repack_experts:
        params.tensor_buft_overrides = ctypes.cast(kept, ctypes.c_void_p)
    with only_repack() if repacking else nullcontext():
        model = llama_cpp.llama_model_load_from_file(os.fsencode(Path(path)), params)
    if not model:
        raise RuntimeError(f"{path}: stock llama.cpp does not load it")
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


@contextmanager
def stock_context(
    model: Any,
    *,
    n_ctx: int = 256,
    n_batch: int = 512,
    n_ubatch: int = 512,
    n_threads: int = 2,
    flash_attention: bool = False,
    cb_eval: Any = None,
) -> Iterator[Any]:
    """A llama_context of the model; freed at the end. cb_eval: a ggml_backend_sched_eval_callback."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = n_ctx
    params.n_batch = n_batch
    params.n_ubatch = n_ubatch
    params.n_threads = n_threads
    params.n_threads_batch = n_threads
    params.flash_attn_type = int(flash_attention)  # LLAMA_FLASH_ATTN_TYPE_DISABLED 0, _ENABLED 1
    if cb_eval is not None:
        params.cb_eval = cb_eval
    ctx = llama_cpp.llama_init_from_model(model, params)
    if not ctx:
        raise RuntimeError(f"llama.cpp makes no context: {n_ctx=}, {n_batch=}, {n_ubatch=}")
    try:
        yield ctx
    finally:
        llama_cpp.llama_free(ctx)


def logits_of_context(
    ctx: Any, model: Any, tokens: Sequence[int], n_batch: int, all_positions: bool = True
) -> FloatArray:
    """Logits of the tokens as one sequence from position 0; what the context held before is forgotten.

    ctx, model: llama_context and llama_model, also those of a `Llama`: llama._ctx.ctx, llama._model.model.
    n_batch: tokens given to one llama_decode; at most the context's own n_batch.
    Returns (n_tokens, n_vocab), or (1, n_vocab) without all_positions; owned by the caller.
    Raises RuntimeError with llama_decode's status when it is not 0.
    """
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
    wanted = range(len(tokens)) if all_positions else range(len(tokens) - 1, len(tokens))
    rows: list[FloatArray] = []
    batch = llama_cpp.llama_batch_init(n_batch, 0, 1)
    try:
        for first in range(0, len(tokens), n_batch):
            positions = range(first, min(first + n_batch, len(tokens)))
            _fill(batch, tokens, positions, wanted)
            status = llama_cpp.llama_decode(ctx, batch)
            if status != 0:
                raise RuntimeError(f"llama_decode returned {status} at token {first} of {len(tokens)}")
            rows += [_row(ctx, i, n_vocab) for i, position in enumerate(positions) if position in wanted]
    finally:
        llama_cpp.llama_batch_free(batch)
    return np.stack(rows)


def _fill(batch: Any, tokens: Sequence[int], positions: range, wanted: range) -> None:
    batch.n_tokens = len(positions)
    for i, position in enumerate(positions):
        batch.token[i] = int(tokens[position])
        batch.pos[i] = position
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
        batch.logits[i] = position in wanted


def _row(ctx: Any, i: int, n_vocab: int) -> FloatArray:
    pointer = llama_cpp.llama_get_logits_ith(ctx, i)
    row: FloatArray = np.ctypeslib.as_array(pointer, shape=(n_vocab,)).copy()
    return row


# ---- what a stock context computes between tokens and logits ---------------------------------------------------


class GgmlTensor(ctypes.Structure):
    """ggml.h, struct ggml_tensor of ggml 0.25."""

    _fields_ = [
        ("type", ctypes.c_int32), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int32), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64), ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    ]  # fmt: skip

    def values(self) -> np.ndarray:
        """A copy, in numpy's order of dimensions."""
        kind = {0: np.float32, 26: np.int32}[self.type]
        shape, strides = tuple(self.ne)[::-1], tuple(self.nb)[::-1]
        span = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + np.dtype(kind).itemsize
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(self.data))
        return np.ndarray(shape, kind, raw, 0, strides).copy()  # type: ignore[no-any-return]


def logits_with_look(
    path: str | os.PathLike[str],
    tokens: Sequence[int],
    n_batch: int,
    prefixes: tuple[str, ...],
    look: Callable[[GgmlTensor], None],
    *,
    n_ctx: int,
) -> FloatArray:
    """Logits of stock llama.cpp on one thread, after each token. look: is given every node whose name begins with one
    of `prefixes`, in the order they are computed, and may change its data before they are used."""

    @llama_cpp.ggml_backend_sched_eval_callback  # type: ignore[untyped-decorator]
    def each(address: int, ask: bool, _user: object) -> bool:
        tensor = GgmlTensor.from_address(address)
        wanted = tensor.name.decode().startswith(prefixes)
        if wanted and not ask:
            look(tensor)
        return wanted or not ask

    with (
        stock_model(path) as model,
        stock_context(
            model, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_batch, n_threads=1, cb_eval=each
        ) as context,
    ):  # fmt: skip
        return logits_of_context(context, model, tokens, n_batch)
