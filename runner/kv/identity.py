"""Whether a state on disk belongs to this model, run in this way; and the folder of such states."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_edge.models.store.skeleton import cache_folder
from moe_edge.runner.llama_package import COMPILED, llama_build


def prompt_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where the prompt cache is; cache_dir as in models/store/skeleton.py, beside whose folder it stands."""
    return cache_folder(cache_dir).with_name("prompts")


def identity_of(
    store_id: str, policy: Mapping[str, Any], *, n_ctx: int, n_ubatch: int, flash_attn: bool,
    cache_types: tuple[str, str], n_threads: int, repacked: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """What changes the bits of a KV cache, or its form. The rope's settings are in the skeleton, so in the store's id.

    The memory budget is not part of it: the bits are the same at every budget. The number of threads is, with flash
    attention alone, which over 512 cells sums by thread (docs/LOG.md, 2026-11-27). repacked: whether dense weights
    were, see runner/dense_repack.py; named only then, so that the states of earlier versions are still good.
    """
    return {
        "store": store_id,
        "policy": dict(policy),
        "n_ctx": n_ctx,
        "n_ubatch": n_ubatch,
        "flash_attn": flash_attn,
        "n_threads": n_threads if flash_attn else 0,
        "cache_type_k": cache_types[0],
        "cache_type_v": cache_types[1],
        "llama_cpp_python": llama_build().removeprefix(f"{COMPILED} "),
        **({"repacked": True} if repacked else {}),
    }


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The first thing in which two identities differ, for a sentence; empty when they are the same."""
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            return f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here"
    return ""
