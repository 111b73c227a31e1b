"""`--warm-start`: the usage of a model's experts, kept between runs in the folder of the cached skeletons.

The file is a compressed .npz named after the store, nothing pickled: `version`, `n_experts` int32 [L], `tokens`
float64, `counts` float64 [sum of n_experts]. Losing it costs a few reads, so a file that cannot be read or written is
no error: one sentence says so, and the run goes on without.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
from moe_edge.convert.skeleton import cache_folder
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.usage import Usage

USAGE_VERSION = 1


def usage_path(store_id: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where the usage of a store's experts is kept; cache_dir as in convert/skeleton.py."""
    return cache_folder(cache_dir) / f"{store_id}.usage.npz"


def load_usage(path: Path, layout: Layout) -> tuple[Usage, str | None]:
    """The usage that was kept, an empty one when there is none; and a sentence about a file that is of no use."""
    empty = Usage(layout.n_experts)
    try:
        # opened here: np.load leaves a file open that it cannot read
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            version, n_experts = int(file["version"]), tuple(file["n_experts"].tolist())
            tokens, counts = float(file["tokens"]), file["counts"].astype(np.float64)
    except FileNotFoundError:
        return empty, None
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        return empty, f"{path}: the usage of earlier runs cannot be read ({error or 'cut short'}); starting without"
    if version != USAGE_VERSION:
        return empty, f"{path}: the usage is of version {version}, not {USAGE_VERSION}; starting without"
    fits = n_experts == layout.n_experts and counts.shape == (sum(n_experts),)
    if not (fits and np.isfinite(counts).all() and (counts >= 0).all() and 0 <= tokens < np.inf):
        return empty, f"{path}: the usage does not fit the model; starting without"
    return Usage(layout.n_experts, counts.tolist(), tokens), None


def save_usage(path: Path, usage: Usage) -> str | None:
    """Write it beside and rename; a sentence when that fails."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            np.savez_compressed(
                file,
                version=np.int32(USAGE_VERSION),
                n_experts=np.array(usage.n_experts, np.int32),
                tokens=np.float64(usage.tokens),
                counts=np.array(usage.counts, np.float64),
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        return f"{path}: the usage cannot be kept: {error.strerror or error}"
    return None
