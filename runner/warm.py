"""`--warm-start`: the usage of a model's experts, kept between runs in the folder of the cached skeletons, and what is
read at load by it.

The file is a compressed .npz named after the store, nothing pickled: `version`, `n_experts` int32 [L], `tokens`
float64, `counts` float64 [sum of n_experts]. Losing it costs a few reads, so a file that cannot be read or written is
no error: one sentence says so, and the run goes on without. Deleting it forgets; of two runs at a time the one that
ends last is kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from moe_edge.models.errors import MoeEdgeError
from moe_edge.models.formats.files import is_present
from moe_edge.models.formats.npz import Damaged, open_npz, read_arrays
from moe_edge.models.formats.work import new_file
from moe_edge.models.store.skeleton import cache_folder
from moe_edge.runner.capi import Counters
from moe_edge.schedulers.budget import MIB, format_bytes
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.usage import Usage, preload_order

USAGE_VERSION = 1
DAMAGE = "damaged, or not a usage file"
BATCH_BYTES = 64 * MIB  # of one call to the library; Ctrl-C is heard between two


class Preloader(Protocol):
    """What of NativeModel is needed here."""

    def preload(self, units: Sequence[int]) -> None: ...

    def counters(self) -> Counters: ...


class Resettable(Protocol):
    """What of a policy is needed here."""

    def reset(self, resident: Iterable[int]) -> None: ...


@dataclass(frozen=True)
class Preloaded:
    """What was read at load, before the first token."""

    n_experts: int
    bytes_read: int
    seconds: float


class WarmStart:
    """The usage of earlier runs, in which this run is to be counted, for one engine.

    Give `usage` to make_policy(), which counts in it; then preload(), and save() when the run is over.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self._layout = path, layout
        self.usage, self._said = load_usage(path, layout)
        self.preloaded = Preloaded(0, 0, 0.0)

    def preload(self, native: Preloader, policy: Resettable, arena_bytes: int) -> str:
        """Read the most used experts that fit the empty arena; a line that says so. Raises EngineError."""
        if self._said is not None:
            return f"warm start: {self._said}"
        if self.usage.tokens <= 0:
            return f"warm start: no usage of earlier runs yet; it will be kept in {self.path}"
        started, before = time.monotonic(), native.counters()
        units = preload_order(self.usage, self._layout, arena_bytes)
        for batch in _batches(units, self._layout):
            native.preload(batch)
        policy.reset(reversed(units))
        bytes_read = native.counters().since(before).bytes_read
        p = self.preloaded = Preloaded(len(units), bytes_read, time.monotonic() - started)
        return (
            f"warm start: {p.n_experts} experts, {format_bytes(p.bytes_read)} read in {p.seconds:.2f} s, "
            f"by the usage of earlier runs in {self.path}"
        )

    def save(self) -> str | None:
        """Keep the usage, unless this run used nothing; a sentence when that fails."""
        return save_usage(self.path, self.usage) if self.usage.tokens_now > 0 else None


def _batches(units: Sequence[int], layout: Layout) -> Iterator[list[int]]:
    """The units in their order, up to BATCH_BYTES at a time, one at least."""
    batch: list[int] = []
    size = 0
    for unit in units:
        if batch and size + layout.unit_bytes[unit] > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(unit)
        size += layout.unit_bytes[unit]
    if batch:
        yield batch


def usage_path(store_id: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where the usage of a store's experts is kept; cache_dir as in models/store/skeleton.py."""
    return cache_folder(cache_dir) / f"{store_id}.usage.npz"


def load_usage(path: Path, layout: Layout) -> tuple[Usage, str | None]:
    """The usage that was kept, an empty one when there is none; and a sentence about a file that is of no use."""
    empty = Usage(layout.n_experts)
    try:
        if not is_present(path):
            return empty, None
        with open_npz(path) as file:
            found = read_arrays(file, _needed, most_bytes=8 * max(1, sum(layout.n_experts)))
        version, tokens = _whole(found["version"]), float(_one(found["tokens"]))
        n_experts = tuple(_whole(each) for each in found["n_experts"].ravel())
        counts = found["counts"].astype(np.float64)
    except (MoeEdgeError, Damaged, ValueError, TypeError, OverflowError) as error:
        # numpy's own words are about pickles, which is no help here
        why = str(error).removeprefix(f"{path}: ") if isinstance(error, MoeEdgeError) else DAMAGE
        return empty, f"{path}: the usage of earlier runs cannot be read ({why}); starting without"
    if version != USAGE_VERSION:
        return empty, f"{path}: the usage is of version {version}, not {USAGE_VERSION}; starting without"
    fits = n_experts == layout.n_experts and counts.shape == (sum(n_experts),)
    if not (fits and np.isfinite(counts).all() and (counts >= 0).all() and 0 <= tokens < np.inf):
        return empty, f"{path}: the usage does not fit the model; starting without"
    return Usage(layout.n_experts, counts.tolist(), tokens), None


def save_usage(path: Path, usage: Usage) -> str | None:
    """Write it beside and rename; a sentence when that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            np.savez_compressed(
                file,
                version=np.int32(USAGE_VERSION),
                n_experts=np.array(usage.n_experts, np.int32),
                tokens=np.float64(usage.tokens),
                counts=np.array(usage.counts, np.float64),
            )
    except OSError as error:
        return f"{path}: the usage cannot be kept: {error.strerror or error}"
    return None


def _needed(names: list[str]) -> tuple[str, ...]:
    return "version", "n_experts", "tokens", "counts"


def _one(array: npt.NDArray[Any]) -> Any:
    if array.shape != ():
        raise ValueError(f"shape {array.shape} for one number")
    return array.item()


def _whole(value: Any) -> int:
    if value.dtype.kind != "i":
        raise ValueError(f"{value.dtype} for a whole number")
    return int(_one(np.asarray(value)))
