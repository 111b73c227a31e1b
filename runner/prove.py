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
from importlib import metadata
from pathlib import Path

import moe_edge.models.errors as errors
from moe_edge.models.errors import BudgetTooSmall, CannotRun, MoeEdgeError
from moe_edge.models.formats.gguf import GGUFFile, read_gguf
from moe_edge.models.formats.write import drop_cache
from moe_edge.models.store.skeleton import cache_folder
from moe_edge.models.store.sound import forget
from moe_edge.models.store.store import ExpertModel, open_model
from moe_edge.runner import child
from moe_edge.runner.dense_repack import repacks
from moe_edge.runner.llama_package import llama_package
from moe_edge.runner.reason import ending, reason, refusal

# What a child can show. A model that decodes also loads.
NOTHING, LOADS, DECODES = "nothing", "loads", "decodes"

START_SECONDS = 180  # emulated ARM beside a busy machine took over 60 (docs/LOG.md, 2026-11-27)
BYTES_PER_SECOND = 10e6  # of a very slow disk: how long reading the dense weights may take


def prove(skeleton: Path, named: str | os.PathLike[str] | None = None) -> None:
    """Prove a model that was just written, whatever is remembered. Raises CannotRun, and what opening it raises.

    named: what the user calls the model; the skeleton itself unless given.
    """
    model, file = open_model(skeleton), read_gguf(skeleton)
    repack = repacks("auto")
    if _prove(model, file, str(named or skeleton), DECODES, flash_attn=False, repack=repack, all_finite=True):
        _remember(_markers(model, file, flash_attn=False, repack=repack).get(DECODES))


def prove_once(
    model: ExpertModel, skeleton: GGUFFile, named: str, what: str, *, flash_attn: bool, repack: bool = False,
    remember: bool = True,
) -> None:
    """Prove an open model, unless that was done before. Raises CannotRun, naming the model `named`.

    skeleton: the header of model.skeleton. what: LOADS, as far as llama.cpp says what it would allocate, which reads no
    weights; DECODES; or NOTHING. remember: write down that it was proved. A cached skeleton that fails is removed from
    the cache.
    """
    if what == NOTHING:
        return
    markers = _markers(model, skeleton, flash_attn, repack)
    if any(path.exists() for each, path in markers.items() if what in (LOADS, each)):
        return
    try:
        proved = _prove(model, skeleton, named, what, flash_attn=flash_attn, repack=repack, all_finite=False)
    except MoeEdgeError as e:
        if repack and isinstance(e, CannotRun) and _runs_plainly(model, skeleton, named, what, flash_attn):
            raise CannotRun(f"{e}; that is with repacked weights, and it runs with --repack off") from e
        if model.in_place and model.skeleton.parent == _cached():
            forget(model.skeleton)
        raise
    if proved and remember:
        _remember(markers.get(what))


def _runs_plainly(model: ExpertModel, skeleton: GGUFFile, named: str, what: str, flash_attn: bool) -> bool:
    """Whether a model that fails with repacked weights can be proved without."""
    try:
        return _prove(model, skeleton, named, what, flash_attn=flash_attn, repack=False, all_finite=False)
    except MoeEdgeError:
        return False


def _prove(
    model: ExpertModel, skeleton: GGUFFile, named: str, what: str, *, flash_attn: bool, repack: bool, all_finite: bool
) -> bool:
    """Whether a child could show it; False when that could not be tried. Raises what the child found."""
    dense_bytes = model.dense_bytes if what == DECODES else 0
    try:
        ended = child.run(
            "moe_edge.runner.prove_child:in_child", START_SECONDS + dense_bytes / BYTES_PER_SECOND,
            skeleton=str(model.skeleton), named=named, what=what, flash_attn=flash_attn, repack=repack,
            all_finite=all_finite, header_bytes=len(skeleton.header),
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


def _markers(model: ExpertModel, skeleton: GGUFFile, flash_attn: bool, repack: bool) -> dict[str, Path]:
    """The files whose existence says that LOADS and DECODES were proved; none without a cache folder."""
    folder = _cached()
    if folder is None:
        return {}
    name = _digest(model, skeleton, flash_attn, repack)
    return {what: folder.parent / "proven" / f"{name}.{what}" for what in (LOADS, DECODES)}


def _cached() -> Path | None:
    """The folder of cached skeletons, if this user has one."""
    try:
        return cache_folder()
    except MoeEdgeError:
        return None


def _digest(model: ExpertModel, skeleton: GGUFFile, flash_attn: bool, repack: bool) -> str:
    """32 hex digits over what llama.cpp and the engine read of a model but the numbers, and over their releases."""
    digest = hashlib.sha256()
    releases = [metadata.version("moe-edge"), llama_package()]
    kinds = sorted({(p.type, p.cols, p.rows) for p in model.pieces})
    settings = (releases, flash_attn, repack)
    digest.update(repr((settings, model.layers, model.levels, sorted(model.biases), kinds)).encode())
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
