"""`python -m moe_edge.runner.prove SKELETON`: decode one token; exit 0 when its logits are finite."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from moe_edge.models.errors import MoeEdgeError, WorkError
from moe_edge.runner.engine import Engine, EngineOptions
from moe_edge.runner.show import NO_LIMIT


def decode_one(path: Path) -> None:
    """Raises WorkError when a logit is not finite: then some expert product was not the engine's."""
    options = EngineOptions(ram_bytes=NO_LIMIT, n_ctx=64, n_ubatch=8, logits_all=True, map_dense=True)
    with Engine(path, options) as engine, engine.decoding():
        engine.llama.eval([max(0, engine.llama.token_bos())])
        logits = engine.llama.scores[0]
        if not np.isfinite(logits).all():
            raise WorkError(f"{path}: {int((~np.isfinite(logits)).sum())} of {logits.size} logits are not finite")


if __name__ == "__main__":
    try:
        decode_one(Path(sys.argv[1]))
    except MoeEdgeError as e:
        print(e, file=sys.stderr)
        sys.exit(1)
