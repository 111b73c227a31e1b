"""Which experts are multiplied by ggml's repacked kernels: by what was counted, or as the environment says.

For those who have a board to measure on. What repacking does is in native/repack.h, what was counted in docs/LOG.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from moe_edge.models.errors import UnknownName
from moe_edge.models.formats.ggml_types import type_name
from moe_edge.models.store.experts import Piece
from moe_edge.runner.capi import library

VARIABLE = "MOE_EDGE_REPACK"
WAYS = ("auto", "always", "never")  # in the order of me_repacking in native/capi.h


def repacking() -> int:
    """The environment's way as me_repacking; auto unless it says otherwise. Raises UnknownName."""
    way = os.environ.get(VARIABLE) or WAYS[0]
    if way not in WAYS:
        raise UnknownName(f"{VARIABLE}={way} is no way to multiply experts; known: {', '.join(WAYS)}")
    return WAYS.index(way)


def is_repacked(type_id: int, n_cols: int, n_rows: int) -> bool:
    """Whether an expert's matrix of this ggml type and shape is, on this processor. Raises UnknownName."""
    return bool(library().me_kernel(type_id, n_cols, n_rows, repacking()))


def repacked_types(pieces: Iterable[Piece]) -> tuple[str, ...]:
    """Names of the ggml types of which there are experts that are repacked; their bits depend on it."""
    shapes = {(piece.type, piece.cols, piece.rows) for piece in pieces}
    return tuple(sorted({type_name(shape[0]) for shape in shapes if is_repacked(*shape)}))
