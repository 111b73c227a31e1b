"""The child's side of a proof: load the model, decode a few tokens, and say in one line what went wrong.

runner/prove.py starts it, and says why a child is needed at all.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from moe_edge.models.errors import CannotRun, MoeEdgeError
from moe_edge.runner import child
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.llama_package import import_llama
from moe_edge.runner.prove import LOADS, NOTHING
from moe_edge.runner.reason import refusal
from moe_edge.runner.sizes import NO_LIMIT
from moe_edge.schedulers.budget import plan_memory

PROBE = "A  word,\n\n\t12345 w\u00f6rd \u4f60\u597d \U0001f600 ".encode() + bytes(range(256))
N_CTX, N_TOKENS = 64, 4  # a small batch as in a prefill, then one token as in a reply
# Of anonymous memory, beyond the header and the experts of one step. Llama.cpp allocates by numbers in the header.
MEMORY_BYTES = 1 << 30
MEMORY_PER_HEADER_BYTE = 40  # vocabularies: strings and maps of them


def in_child(
    skeleton: str, named: str, what: str, flash_attn: bool, repack: bool, all_finite: bool, header_bytes: int
) -> None:
    """Load, and decode; the exit status is the verdict, and one line of JSON: the class and the message of an error."""
    child.limit("RLIMIT_DATA", limit := MEMORY_BYTES + MEMORY_PER_HEADER_BYTE * header_bytes)
    try:
        import_llama()
        _tell_log()
        sys.stderr = open(os.devnull, "w")  # llama-cpp-python prints the metadata there; llama.cpp itself uses number 2
        try_model(Path(skeleton), named, what, flash_attn, repack, all_finite, limit)
    except MoeEdgeError as e:
        found = type(e).__name__, str(e)
    except MemoryError:
        found = CannotRun.__name__, refusal(named, "it asks for too much memory")
    except RuntimeError as e:  # llama-cpp-python's, for a call that llama.cpp refuses
        found = CannotRun.__name__, refusal(named, str(e))
    except Exception as e:  # a fault of our own says nothing of the model
        found = type(e).__name__, str(e)
    else:
        return
    print(json.dumps(found))
    sys.exit(1)


def _tell_log() -> None:
    """Let llama.cpp's warnings and errors reach standard error at once: a process that aborts keeps nothing."""
    import llama_cpp

    set_log = llama_cpp.llama_log_set
    kept: list[Any] = []
    warning, error, more = 3, 4, 5  # ggml_log_level

    def set_both(callback: Any, user: Any) -> None:
        telling = False

        def both(level: int, text: bytes, user_data: Any) -> None:
            nonlocal telling
            telling = level in (warning, error) or (telling and level == more)
            if telling:
                os.write(2, text)
            callback(level, text, user_data)

        kept.append(llama_cpp.llama_log_callback(both))
        set_log(kept[-1], user)

    llama_cpp.llama_log_set = set_both


def try_model(
    skeleton: Path, named: str, what: str, flash_attn: bool, repack: bool, all_finite: bool, limit: int
) -> None:
    """Load a model as far as `what` says, in as little memory as it runs in.

    Raises CannotRun when no logit is finite: then some expert product was not the engine's, and a stub of NaN was used.
    all_finite: when a single one is not, too.
    """
    # verbose: otherwise llama-cpp-python closes standard error while it loads
    options = EngineOptions(
        ram_bytes=NO_LIMIT, n_ctx=N_CTX, n_ubatch=8, n_threads=1, logits_all=True, map_dense=True,
        flash_attn=flash_attn, repack="on" if repack else "off", verbose=True, proof=NOTHING,
    )  # fmt: skip
    engine = Engine(skeleton, options, named=named)
    try:
        if what == LOADS:
            return
        engine.plan = plan_memory(
            engine.plan.floor_bytes, engine.plan.fixed, engine.layout, engine.model.n_expert_used
        )
        child.limit("RLIMIT_DATA", limit + engine.plan.floor_bytes)
        llama = engine.load()
        _try_tokens(llama)
        token = llama.token_bos() if 0 <= llama.token_bos() < llama.n_vocab() else 0
        with engine.decoding():
            for n in (N_TOKENS, 1):
                llama.eval([token] * n)
        finite = np.isfinite(llama.scores[: llama.n_tokens])
        if not (finite.all() if all_finite else finite.any()):
            n_bad = finite.size - int(finite.sum())
            raise CannotRun(f"{named}: {n_bad} of {finite.size} logits are not finite; its weights are damaged")
    finally:
        engine.close()


def _try_tokens(llama: Any) -> None:
    """Every byte into tokens, and every token into bytes: llama.cpp aborts where a vocabulary has no answer."""
    import llama_cpp

    if llama_cpp.llama_vocab_type(llama._model.vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        return
    for special in (False, True):
        llama.tokenize(PROBE, add_bos=True, special=special)
        for token in range(llama.n_vocab()):
            piece = llama_cpp.llama_token_to_piece
            piece(llama._model.vocab, token, None, 0, 0, special)
