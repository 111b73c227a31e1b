"""Whether llama.cpp repacks the dense weights for this processor, which of them, and what memory that takes.

ggml keeps a repacked matrix in rows of blocks, side by side, as its ARM kernels read them (CPU_REPACK). The products
round otherwise than those of the plain order, so this belongs to what a state or a proof was made with. Experts are
no matter of this: llama.cpp sees stubs of them, which it never repacks, whatever the engine does with its own.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from moe_edge.models.errors import UnknownName
from moe_edge.models.formats.gguf import GGUFFile
from moe_edge.runner.capi import library

REPACK = ("auto", "on", "off")
ARM = ("aarch64", "arm64")

# Tables that are looked up in, which no product reads; llama.cpp keeps them as they are.
LOOKED_UP = ("token_embd.weight", "per_layer_token_embd.weight", "position_embd.weight", "token_types.weight")
Repacks = Callable[[int, int, int, int], bool]  # type, columns, rows, matrices in the stack


def repacks(asked: str, machine: str | None = None) -> bool:
    """Whether a load repacks. asked: of REPACK. machine: as platform.machine() says; this one unless given.

    auto is llama.cpp's own default on ARM. On x86-64 it is not: a prompt of 512 tokens took 35 to 70 % longer with
    repacked weights, which miss ggml's tiled kernels there (docs/LOG.md, 2026-11-22). Raises UnknownName.
    """
    if asked not in REPACK:
        raise UnknownName(f"unknown repack '{asked}'; known: {', '.join(REPACK)}")
    return asked == "on" or (asked == "auto" and (machine or platform.machine()).lower() in ARM)


def processor_repacks(kind: int, n_cols: int, n_rows: int, n_stacked: int = 1) -> bool:
    """Whether ggml has a repacked form of a matrix of this ggml type for this processor; n_stacked of them in one."""
    return bool(library().me_repacks(kind, n_cols, n_rows, n_stacked))


@contextlib.contextmanager
def only_repack() -> Iterator[None]:
    """Inside, llama.cpp finds CPU_REPACK and no other of ggml's extra buffer types. Call it with LOAD_LOCK held.

    AMX, which x86-64 builds for such processors have, crashes on some of them (docs/LLAMACPP.md, section 9).
    """
    library().me_only_repack(1)
    try:
        yield
    finally:
        library().me_only_repack(0)


@dataclass(frozen=True)
class Repacked:
    """In bytes. nbytes: weights that are kept repacked, and not in the order of their file. twice_bytes: of them, what
    is kept in that order as well: an embedding that is the output too. reading_bytes: see reading_bytes()."""

    nbytes: int = 0
    twice_bytes: int = 0
    reading_bytes: int = 0


NONE = Repacked()


def repacked(skeleton: GGUFFile, repacks: Repacks = processor_repacks) -> Repacked:
    """What a load of this skeleton repacks, as llama.cpp decides it (llama-model-loader.cpp, select_weight_buft)."""
    sizes: list[int] = []
    for name, tensor in skeleton.tensors.items():
        stacked = "exps." in name and len(tensor.shape) == 3
        if name in LOOKED_UP or not (stacked or len(tensor.shape) == 2):
            continue
        if repacks(tensor.type, tensor.shape[0], tensor.shape[1], tensor.shape[2] if stacked else 1):
            sizes.append(tensor.nbytes)
    twice = 0
    embedding = skeleton.tensors.get("token_embd.weight")
    is_output = embedding is not None and "output.weight" not in skeleton.tensors
    if embedding and is_output and repacks(embedding.type, embedding.shape[0], embedding.shape[1], 1):
        twice = embedding.nbytes
        sizes.append(twice)
    return Repacked(sum(sizes), twice, reading_bytes(sizes))


def reading_bytes(sizes: Sequence[int]) -> int:
    """The most that matrices of these sizes take while llama.cpp reads and repacks them.

    Without a mapping it reads them before anything else, the largest first, each into a copy that it frees when the
    matrix is repacked (llama-model-loader.cpp, load_all_data).
    """
    most, done = 0, 0
    for size in sorted(sizes, reverse=True):
        done += size
        most = max(most, done + size)
    return most
