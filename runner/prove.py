"""The proof of a model: a child process lets llama.cpp load it and decode a few tokens, before this process does.

llama.cpp ends the process on a model that contradicts itself: an assertion, an exception that nobody catches, a crash.
In a child each of them becomes one sentence with llama.cpp's own reason. What was proved is remembered by what
llama.cpp reads of the model (all but the numbers in its tensors), so it costs once for each model and release.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import moe_edge.models.errors as errors
from moe_edge.models.errors import BudgetTooSmall, CannotRun, MoeEdgeError
from moe_edge.models.formats.gguf import GGUFFile, read_gguf
from moe_edge.models.formats.write import drop_cache
from moe_edge.models.store.skeleton import cache_folder
from moe_edge.models.store.sound import forget
from moe_edge.models.store.store import ExpertModel, open_model
from moe_edge.runner import child
from moe_edge.runner.reason import ending, reason, refusal

# What a child can show. A model that decodes also loads.
NOTHING, LOADS, DECODES = "nothing", "loads", "decodes"

PROBE = "A  word,\n\n\t12345 w\u00f6rd \u4f60\u597d \U0001f600 ".encode() + bytes(range(256))
N_CTX, N_TOKENS = 64, 4  # a small batch as in a prefill, then one token as in a reply
START_SECONDS = 60
BYTES_PER_SECOND = 10e6  # of a very slow disk: how long reading the dense weights may take
# Of anonymous memory, beyond the header and the experts of one step. Llama.cpp allocates by numbers in the header.
MEMORY_BYTES = 1 << 30
MEMORY_PER_HEADER_BYTE = 40  # vocabularies: strings and maps of them


def prove(skeleton: Path, named: str | os.PathLike[str] | None = None) -> None:
    """Prove a model that was just written, whatever is remembered. Raises CannotRun, and what opening it raises.

    named: what the user calls the model; the skeleton itself unless given.
    """
    model, file = open_model(skeleton), read_gguf(skeleton)
    if _prove(model, file, str(named or skeleton), DECODES, flash_attn=False, all_finite=True):
        _remember(_markers(model, file, flash_attn=False).get(DECODES))


def prove_once(
    model: ExpertModel, skeleton: GGUFFile, named: str, what: str, *, flash_attn: bool, remember: bool = True
) -> None:
    """Prove an open model, unless that was done before. Raises CannotRun, naming the model `named`.

    skeleton: the header of model.skeleton. what: LOADS, as far as llama.cpp says what it would allocate, which reads no
    weights; DECODES; or NOTHING. remember: write down that it was proved. A cached skeleton that fails is removed from
    the cache.
    """
    if what == NOTHING:
        return
    markers = _markers(model, skeleton, flash_attn)
    if any(path.exists() for each, path in markers.items() if what in (LOADS, each)):
        return
    try:
        proved = _prove(model, skeleton, named, what, flash_attn=flash_attn, all_finite=False)
    except MoeEdgeError:
        if model.in_place and model.skeleton.parent == _cached():
            forget(model.skeleton)
        raise
    if proved and remember:
        _remember(markers.get(what))


def _prove(
    model: ExpertModel, skeleton: GGUFFile, named: str, what: str, *, flash_attn: bool, all_finite: bool
) -> bool:
    """Whether a child could show it; False when that could not be tried. Raises what the child found."""
    dense_bytes = model.dense_bytes if what == DECODES else 0
    try:
        ended = child.run(
            "moe_edge.runner.prove:in_child", START_SECONDS + dense_bytes / BYTES_PER_SECOND,
            skeleton=str(model.skeleton), named=named, what=what, flash_attn=flash_attn, all_finite=all_finite,
            header_bytes=len(skeleton.header),
        )  # fmt: skip
    except OSError:  # no process to be had: the model itself may still be loaded
        return False
    finally:
        _drop_pages(model.skeleton)
    return _judge(ended, str(model.skeleton), named)


def _drop_pages(skeleton: Path) -> None:
    """The child mapped the dense weights: their pages are not to stay beside what this process will read of them."""
    with contextlib.suppress(OSError), open(skeleton, "rb") as file:
        drop_cache(file.fileno())


def _judge(ended: child.Ended, skeleton: str, named: str) -> bool:
    """Whether a child has proved the model, or could not tell. Raises the fault that it found."""
    if ended.status == 0:
        return True
    if ended.status == child.TIMED_OUT:
        raise CannotRun(refusal(named, "it did not come to an end in the time given"))
    verdict = _verdict(ended.out)
    if ended.status < 0 or verdict is None:
        why = reason(ended.err, ended.status) or ending(ended.status)
        raise CannotRun(refusal(named, why.replace(skeleton, named)))
    kind, said = verdict
    if kind not in vars(errors) or kind == BudgetTooSmall.__name__:  # for this process to meet, and to say
        return False
    raise getattr(errors, kind)(said.replace(skeleton, named))


def _verdict(out: str) -> tuple[str, str] | None:
    """The last line of the child's output: the class and the message of what it raised; None when it wrote none."""
    try:
        kind, said = json.loads(out.splitlines()[-1])
    except (ValueError, IndexError, TypeError):
        return None
    return str(kind), str(said)


# ---- what is remembered ------------------------------------------------------------------------------------


def _markers(model: ExpertModel, skeleton: GGUFFile, flash_attn: bool) -> dict[str, Path]:
    """The files whose existence says that LOADS and DECODES were proved; none without a cache folder."""
    folder = _cached()
    if folder is None:
        return {}
    name = _digest(model, skeleton, flash_attn)
    return {what: folder.parent / "proven" / f"{name}.{what}" for what in (LOADS, DECODES)}


def _cached() -> Path | None:
    """The folder of cached skeletons, if this user has one."""
    try:
        return cache_folder()
    except MoeEdgeError:
        return None


def _digest(model: ExpertModel, skeleton: GGUFFile, flash_attn: bool) -> str:
    """32 hex digits over what llama.cpp and the engine read of a model but the numbers, and over their releases."""
    digest = hashlib.sha256()
    releases = [metadata.version(name) for name in ("moe-edge", "llama-cpp-python")]
    kinds = sorted({(p.type, p.cols, p.rows) for p in model.pieces})
    digest.update(repr((releases, flash_attn, model.layers, model.levels, sorted(model.biases), kinds)).encode())
    for key in skeleton.kv:
        if not key.startswith("moe_edge."):
            digest.update(skeleton.kv.record(key))
    shapes = [(each.name, each.shape, each.type) for each in skeleton.tensors.values()]
    digest.update(repr(shapes).encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def _remember(marker: Path | None) -> None:
    if marker is None:
        return
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError:
        pass  # a cache that cannot be written costs the proof again


# ---- the child's side --------------------------------------------------------------------------------------


def in_child(
    skeleton: str, named: str, what: str, flash_attn: bool, all_finite: bool, header_bytes: int
) -> None:
    """Load, and decode; the exit status is the verdict, and one line of JSON: the class and the message of an error."""
    child.limit("RLIMIT_DATA", limit := MEMORY_BYTES + MEMORY_PER_HEADER_BYTE * header_bytes)
    _tell_log()
    sys.stderr = open(os.devnull, "w")  # llama-cpp-python prints the metadata there; llama.cpp itself uses number 2
    try:
        try_model(Path(skeleton), named, what, flash_attn, all_finite, limit)
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


def try_model(skeleton: Path, named: str, what: str, flash_attn: bool, all_finite: bool, limit: int) -> None:
    """Load a model as far as `what` says, in as little memory as it runs in.

    Raises CannotRun when no logit is finite: then some expert product was not the engine's, and a stub of NaN was used.
    all_finite: when a single one is not, too.
    """
    import numpy as np
    from moe_edge.runner.engine import Engine, EngineOptions
    from moe_edge.schedulers.budget import plan_memory

    class Telling(Engine):
        """llama-cpp-python closes standard error while it loads, unless it is told to be verbose."""

        def _llama_arguments(self) -> dict[str, Any]:
            return {**super()._llama_arguments(), "verbose": True}

    options = EngineOptions(
        ram_bytes=1 << 62, n_ctx=N_CTX, n_ubatch=8, n_threads=1, logits_all=True, map_dense=True,
        flash_attn=flash_attn, proof=NOTHING,
    )  # fmt: skip
    engine = Telling(skeleton, options, named=named)
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
