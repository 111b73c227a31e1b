"""What share of its experts a model's prompts touched, kept between runs beside the cached skeletons, for `plan`.

A few hundred bytes of JSON for each model, named after the files that its experts are in. Losing it makes a forecast
worse and nothing else, so a file that cannot be read counts as none, and one that cannot be written is said.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moe_edge.models.errors import MissingFile, MoeEdgeError
from moe_edge.models.formats.files import is_present
from moe_edge.models.formats.work import new_file
from moe_edge.models.store.skeleton import cache_folder, real_path
from moe_edge.schedulers.layout import Step
from moe_edge.schedulers.touched import Touched

VERSION = 1
MOST_BYTES = 1 << 16


class TouchedFile:
    """The counts of one model: those of earlier runs, and this run's; save() when it is over."""

    def __init__(self, experts_in: Iterable[Path], cache_dir: str | os.PathLike[str] | None = None) -> None:
        key = "\0".join(sorted(f"{real_path(path)}\0{_size(path)}" for path in experts_in))
        name = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32]
        self.path: Path | None = None
        with contextlib.suppress(MissingFile):  # a user without a home keeps nothing
            self.path = cache_folder(cache_dir) / f"{name}.touched.json"
        self.touched = Touched() if self.path is None else _read(self.path)

    def counting(self, plan: Callable[[Step], Any], n_experts: tuple[int, ...]) -> Callable[[Step], Any]:
        """`plan`, with every step but the last layer's counted."""
        note, last = self.touched.note, len(n_experts) - 1

        def counted(step: Step) -> Any:
            if step.n_tokens > 1 and step.layer != last:
                note(step, n_experts[step.layer])
            return plan(step)

        return counted

    def save(self) -> str | None:
        """Keep the counts, unless this run had no prompt to count; a sentence when that fails."""
        if self.touched.noted == 0 or self.path is None:
            return None
        sums = {str(size): sums for size, sums in self.touched.sums.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(self.path) as file:
                file.write(json.dumps({"version": VERSION, "sums": sums}).encode())
        except OSError as error:
            return f"{self.path}: what prompts touched cannot be kept for `plan`: {error.strerror or error}"
        self.touched.noted = 0
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: Path) -> Touched:
    try:
        if not is_present(path) or path.stat().st_size > MOST_BYTES:
            return Touched()
        kept = json.loads(path.read_bytes())
        if kept["version"] != VERSION:
            return Touched()
        if not all(isinstance(sums, list) for sums in kept["sums"].values()):
            return Touched()
        return Touched({int(size): _checked(*map(float, sums)) for size, sums in kept["sums"].items()})
    except (MoeEdgeError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Touched()


def _checked(steps: float, tokens: float, found: float, there: float) -> tuple[float, float, float, float]:
    sums = steps, tokens, found, there
    if not (all(math.isfinite(each) for each in sums) and sums[0] > 0 and sums[1] >= sums[0]):
        raise ValueError("counts that no run makes")
    if not 0 <= sums[2] <= sums[3] or sums[3] <= 0:
        raise ValueError("more experts than there are")
    return sums
