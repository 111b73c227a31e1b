"""Logits of every position of a text that matters: the passes that evaluation and calibration are made of.

A text is cut into chunks of one context each, as llama.cpp's perplexity does it, and each chunk is decoded from an
empty KV cache. What is kept of a reference for comparison is in a file without a name.
"""

from __future__ import annotations

import errno
import math
import shutil
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from moe_edge.models.errors import DiskFull, MissingFile, UsageError
from moe_edge.models.formats.floats import FloatArray
from moe_edge.runner.engine import Engine
from moe_edge.runner.tokens import bos_wanted, tokenize
from moe_edge.schedulers.budget import format_bytes
from numpy.typing import NDArray

DoubleArray = NDArray[np.float64]
IntArray = NDArray[np.int32]
BLOCK_VALUES = 1 << 19  # logits given to numpy at once: 4 MiB in each float64 temporary


def nll_of_rows(rows: FloatArray, tokens: IntArray) -> DoubleArray:
    """-log softmax of each row at its token, in nats: (n,) from (n, n_vocab) and (n,).

    Source: log_softmax() of perplexity.cpp: difference to the maximum and exponential in float32, their sum and its
    logarithm in float64.
    """
    shifted = rows - rows.max(-1, keepdims=True)
    sums = np.exp(shifted).sum(-1, dtype=np.float64)
    nll: DoubleArray = np.log(sums) - shifted[np.arange(len(rows)), tokens]
    return nll


def log_softmax_of_rows(rows: FloatArray) -> DoubleArray:
    """Log probabilities, (n, n_vocab) in float64."""
    x = rows.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x


def kld_of_rows(reference_rows: FloatArray, rows: FloatArray) -> DoubleArray:
    """Kullback-Leibler divergence of each row from its reference, in nats: (n,) from two (n, n_vocab) of logits.

    Source: --kl-divergence of perplexity.cpp, sum p_ref (log p_ref - log p); without its 16-bit log probabilities and
    its cut of reference tokens below exp(-16), which are there to keep its file small.
    """
    p_ref = log_softmax_of_rows(reference_rows)  # log p until np.exp below
    with np.errstate(invalid="ignore"):  # -inf - -inf
        difference = p_ref - log_softmax_of_rows(rows)
    np.exp(p_ref, out=p_ref)
    difference[p_ref == 0] = 0  # 0 log 0, also where a logit is -inf
    kld: DoubleArray = np.einsum("ij,ij->i", p_ref, difference)
    return kld


def standard_error(values: DoubleArray) -> float:
    """Of the mean, with perplexity.cpp's formula; needs two values."""
    return math.sqrt(float(np.var(values)) / (len(values) - 1))


# ---- text to chunks ----------------------------------------------------------------------------------------


def read_text(path: str | Path) -> bytes:
    """The bytes of a text, whatever its encoding. Raises MissingFile."""
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise MissingFile(f"{path}: cannot read the text: {e.strerror or e}") from e


def tokenize_text(engine: Engine, text: bytes) -> list[int]:
    """Tokens of a whole text, BOS first where the model adds one; a final newline is dropped, as `-f` of llama.cpp."""
    tokens = tokenize(engine.llama, text.removesuffix(b"\n"), special=False, add_bos=True)
    return tokens


def cut_chunks(tokens: list[int], n_ctx: int, *, n_chunks: int | None = None, bos: int | None = None) -> IntArray:
    """Consecutive chunks, (chunks, n_ctx); the rest of the tokens is dropped.

    n_chunks: at most so many. bos: replaces the first token of each chunk. Raises UsageError for too few tokens.
    """
    if n_chunks is not None and n_chunks < 1:
        raise UsageError(f"{n_chunks} chunks: at least 1 is needed")
    found = len(tokens) // n_ctx
    if found == 0:
        raise UsageError(
            f"the text has {len(tokens)} tokens but one chunk needs {n_ctx}; give a longer text or shorter chunks"
        )
    n = found if n_chunks is None else min(found, n_chunks)
    chunks = np.array(tokens[: n * n_ctx], np.int32).reshape(n, n_ctx)
    if bos is not None:
        chunks[:, 0] = bos
    return chunks


def bos_token(engine: Engine) -> int | None:
    """The token that begins every chunk; None when the model adds none."""
    return bos_wanted(engine.llama)


# ---- logits ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogitsBlock:
    """Logits of consecutive scored positions of a chunk. rows: (n, n_vocab), a view that the next step overwrites."""

    chunk: int
    position: int
    rows: FloatArray


@dataclass
class PassWork:
    """What a pass did so far. seconds: within llama_decode only, not the reader's arithmetic."""

    tokens: int = 0
    seconds: float = 0.0


def scored_positions(n_ctx: int) -> range:
    """Positions whose logits count, each predicting the next token: the second half, as in perplexity.cpp."""
    return range(n_ctx // 2, n_ctx - 1)


def logits_pass(
    engine: Engine,
    chunks: IntArray,
    *,
    one_by_one: bool = False,
    every_position: bool = False,
    work: PassWork | None = None,
) -> Generator[LogitsBlock, None, None]:
    """The logits of all scored positions, chunk by chunk in order, each chunk from an empty KV cache.

    engine: loaded; with logits_all unless one_by_one (eval_options() sees to it). chunks: (n, n_ctx) tokens.
    every_position: give the logits of all positions. one_by_one: every token is a micro-batch with logits of its own,
    as in decode. Otherwise micro-batches of
    engine.n_ubatch, with logits for scored positions only; llama.cpp then leaves the other tokens out of the last
    layer's feed-forward, as in every prefill.
    The rows belong to llama.cpp and hold until the next block is asked for. The KV cache is empty afterwards.
    Raises EngineError, Stopped or KeyboardInterrupt, as Engine.decoding() does.
    """
    import llama_cpp

    assert one_by_one or engine.options.logits_all, "an engine with room for one row of logits"
    work = work or PassWork()
    n_ctx = chunks.shape[1]
    scored = range(n_ctx) if every_position else scored_positions(n_ctx)
    size = 1 if one_by_one else engine.n_ubatch
    batch = llama_cpp.llama_batch_init(size, 0, 1)
    try:
        for chunk, tokens in enumerate(chunks.tolist()):
            _forget(engine)
            for at in range(0, n_ctx, size):
                positions = range(at, min(at + size, n_ctx))
                wanted = range(max(at, scored.start), min(positions.stop, scored.stop))
                _fill(batch, tokens, positions, positions if one_by_one else wanted)
                started = time.monotonic()
                rows = _decode(engine, batch, len(wanted))
                work.seconds += time.monotonic() - started
                work.tokens += len(positions)
                if wanted:
                    yield LogitsBlock(chunk, wanted.start, rows)
    finally:
        llama_cpp.llama_batch_free(batch)
        _forget(engine)


def _forget(engine: Engine) -> None:
    """Empty the KV cache, and let the Llama know."""
    if engine.llama is not None:
        engine.llama.reset()
        engine.llama._ctx.kv_cache_clear()


def _fill(batch: Any, tokens: list[int], positions: range, wanted: range) -> None:
    batch.n_tokens = len(positions)
    for i, position in enumerate(positions):
        batch.token[i] = tokens[position]
        batch.pos[i] = position
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
        batch.logits[i] = position in wanted


def _decode(engine: Engine, batch: Any, n_rows: int) -> FloatArray:
    """One llama_decode; the first n_rows rows of its logits, where they are."""
    import llama_cpp

    context = engine.llama._ctx.ctx
    n_vocab = int(engine.llama.n_vocab())
    with engine.decoding():
        status = llama_cpp.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        llama_cpp.llama_synchronize(context)
    if n_rows == 0:
        return np.empty((0, n_vocab), np.float32)
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(n_rows, n_vocab))


class ReferenceLogits:
    """Rows of logits in a file without a name, so that nothing stays behind however the process ends.

    Written once from the start, then read in the same order, from the start again after rewind().
    """

    def __init__(self) -> None:
        self._file: Any = tempfile.TemporaryFile(prefix="moe-edge-eval-")

    def check_room(self, n_rows: int, n_vocab: int) -> None:
        """Raises DiskFull when the temporary folder cannot take so many rows."""
        folder = tempfile.gettempdir()
        free, needed = shutil.disk_usage(folder).free, n_rows * n_vocab * 4
        if needed > free:
            raise DiskFull(
                f"{folder} has {format_bytes(free)} free but the reference's logits take {format_bytes(needed)}; "
                "evaluate fewer chunks, or set TMPDIR to a folder with more room"
            )

    def write(self, rows: FloatArray) -> None:
        try:
            self._file.write(np.ascontiguousarray(rows).data.cast("B"))
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DiskFull(f"{tempfile.gettempdir()} is full; evaluate fewer chunks, or set TMPDIR") from e

    def rewind(self) -> None:
        self._file.seek(0)

    def read(self, n_rows: int, n_vocab: int) -> FloatArray:
        rows = np.empty((n_rows, n_vocab), np.float32)
        got = self._file.readinto(rows.data.cast("B"))
        assert got == rows.nbytes, "the reference has as many rows as the pass under test"
        return rows

    def keep(self, engine: Engine, chunks: IntArray, *, one_by_one: bool = False) -> None:
        """Run a pass and keep its logits. Raises DiskFull, and what logits_pass raises."""
        self.check_room(len(chunks) * len(scored_positions(chunks.shape[1])), int(engine.llama.n_vocab()))
        for block in logits_pass(engine, chunks, one_by_one=one_by_one):
            self.write(block.rows)

    def kld(self, engine: Engine, chunks: IntArray, *, one_by_one: bool = False) -> DoubleArray:
        """Run a pass of the same chunks: the KLD of every scored position from what was kept."""
        self.rewind()
        blocks = logits_pass(engine, chunks, one_by_one=one_by_one)
        return np.concatenate([kld_of_rows(self.read(*block.rows.shape), block.rows) for block in blocks])

    def __enter__(self) -> ReferenceLogits:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
