"""Timing what a calibration is going to do, on some experts and rows of the first layer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from moe_edge.convert.quantize import fitting_type, prepare, quantize
from moe_edge.convert.quantizing_time import allocate_in_time
from moe_edge.convert.type_damage import Assignment, ColumnImportance, ExpertErrors
from moe_edge.models.formats.floats import FloatArray
from moe_edge.models.formats.ggml_types import TYPES, find_type
from moe_edge.models.formats.work import part_path
from moe_edge.models.store.experts import MatrixKey
from moe_edge.models.store.source import Source
from moe_edge.runner.calibrate.choose_types import choices_of
from moe_edge.runner.calibrate.expert_weights import MOST_ROWS, ExpertWeights
from moe_edge.runner.calibrate.forecast import timed_twice
from moe_edge.runner.calibrate.observe import CHUNK, LayerView, Timed

PROBE_BYTES = 64 << 20  # written and read back, to learn what the disk does
QUANTIZED_WEIGHTS = 1 << 17  # of each type and thread
SETTINGS = {1: 8, 2: 12}  # rows of the table behind --max-kld, by levels: at the most


@dataclass(frozen=True)
class Rehearsal:
    """bits: of the levels whose types are chosen. types: to choose from. fixed: type names of the other levels, None
    for the source's. n_tokens: of the text."""

    source: Source
    weights: ExpertWeights
    bits: Sequence[float]
    types: Sequence[str]
    fixed: Sequence[str | None]
    most_seconds: float
    n_tokens: int
    n_used: int
    settings_tokens: int

    def seconds(self, timed: Timed, folder: Path) -> dict[str, float]:
        """Stage -> seconds of one unit: a chunk, a run of a chunk for one layer, an expert, a layer, a byte of the
        outputs' experts, a row of settings."""
        experts = list(range(min(self.source.layers[0].n_expert, 2 * self.weights.n_threads)))
        view = self._view(timed)
        importance: dict[MatrixKey, FloatArray] = {}
        layer = self.source.layers[0]

        def find_importance() -> list[ColumnImportance]:
            return list(self.weights.map(ExpertWeights.importance, layer, view, experts=experts))

        found, importance_seconds = timed_twice(find_importance)
        for expert, each in zip(experts, found, strict=True):
            importance |= {(layer.layer, expert, p): each.of(p) for p in layer.projections}
        speeds = self._speeds(importance[layer.layer, 0, "down"])
        kinds = {p: self._kinds() for p in layer.projections} if self.bits else {}
        prepare({*self._kinds(), *(find_type(name).id for name in self.fixed if name is not None)})
        errors, error_seconds = timed_twice(lambda: self._errors(view, experts, kinds, (), importance))
        shares = self._shares(errors, experts)
        assignments = [dict.fromkeys(layer.projections, max(share, key=lambda k: share[k])) for share in shares]
        _, level_seconds = timed_twice(lambda: self._errors(view, experts, {}, assignments, importance))
        n = len(experts)
        x = view.inputs[: CHUNK // 8].astype(np.float32)
        _, output_seconds = timed_twice(lambda: [self.weights.output(layer, expert, x) for expert in experts])
        rows = SETTINGS[len(shares)]
        return {
            "watching": timed.chunk_seconds,
            "sensitivity": timed.chunk_seconds + timed.compare_seconds,
            "experts": (importance_seconds + (error_seconds if self.bits else 0.0)) / n,
            "levels": level_seconds / n,
            "substitution": output_seconds / n * layer.n_expert,
            "writing": self._byte_seconds(shares, speeds, _disk_byte_seconds(folder)),
            "settings": timed.token_seconds * self.settings_tokens * (rows + 1) / rows,
        }

    def _view(self, timed: Timed) -> LayerView:
        """As many rows of each expert as the whole text will give it, of the tokens that were seen."""
        n = max(1, min(MOST_ROWS, self.n_tokens * self.n_used // self.source.layers[0].n_expert))
        rows = np.resize(np.arange(len(timed.inputs)), n)
        n_experts = min(self.source.layers[0].n_expert, 2 * self.weights.n_threads)
        experts = np.tile(np.arange(n_experts, dtype=np.int32), (n, 1))
        return LayerView(timed.inputs[rows], experts, np.full(experts.shape, 1 / self.n_used, np.float32))

    def _kinds(self) -> list[int]:
        return [find_type(name).id for name in self.types]

    def _errors(
        self, view: LayerView, experts: Sequence[int], kinds: Mapping[str, Sequence[int]],
        assignments: Sequence[Assignment], importance: Mapping[MatrixKey, FloatArray],
    ) -> list[ExpertErrors]:  # fmt: skip
        layer = self.source.layers[0]
        return list(self.weights.map(
            ExpertWeights.errors, layer, view, kinds, assignments, importance, experts=experts
        ))  # fmt: skip

    def _speeds(self, importance: FloatArray) -> Callable[[int], float]:
        """Type -> seconds of a weight, all threads at work."""
        layer = self.source.layers[0]
        rows = self.weights.of(layer, 0)["down"]
        rows = np.ascontiguousarray(rows[: max(1, QUANTIZED_WEIGHTS // rows.shape[1])])
        known: dict[int, float] = {}

        def measure(kind: int) -> float:
            fitting = fitting_type(kind, rows.shape[1])
            if fitting == self.source.experts[layer.layer, 0, "down"].type:
                return 0.0
            if fitting not in known:
                prepare({fitting})
                n = self.weights.n_threads
                with ThreadPoolExecutor(n) as pool:
                    _, seconds = timed_twice(
                        lambda: list(pool.map(lambda _: quantize(rows, fitting, importance), range(n)))
                    )
                known[fitting] = seconds / n / rows.size
            return known[fitting]

        return measure

    def _shares(self, errors: Sequence[ExpertErrors], experts: Sequence[int]) -> list[dict[int, float]]:
        """For each level: type -> share of the weights, as these experts would have them."""
        source_type = self.source.experts[self.source.layers[0].layer, 0, "down"].type
        fixed = [{source_type if name is None else find_type(name).id: 1.0} for name in self.fixed]
        if not self.bits:
            return fixed
        layer = replace(self.source.layers[0], n_expert=len(experts))
        choices = choices_of(
            self.source, [layer], self.types, lambda _, expert, p, kind: errors[expert].single[p][kind],
            [np.ones(len(experts), np.int64)],
        )  # fmt: skip
        whole = sum(layer.shape(p)[0] * layer.shape(p)[1] * each.n_expert
                    for each in self.source.layers for p in layer.projections)  # fmt: skip
        limit = self.most_seconds * choices.n_weights / whole
        made, _ = allocate_in_time([choices.wanted(bits) for bits in self.bits], limit)
        chosen = []
        for each in made:
            counts = np.bincount(each.choice, minlength=len(choices.kinds))
            chosen.append({choices.kinds[i]: n / counts.sum() for i, n in enumerate(counts) if n})
        return chosen + fixed

    def _byte_seconds(
        self, shares: Sequence[Mapping[int, float]], speeds: Callable[[int], float], disk: float
    ) -> float:
        quantizing = sum(share * speeds(kind) for some in shares for kind, share in some.items())
        nbytes = sum(share * TYPES[k].block_bytes / TYPES[k].block for some in shares for k, share in some.items())
        return quantizing / nbytes + disk


def _disk_byte_seconds(folder: Path) -> float:
    """Of a byte written, synced and read back."""
    path = part_path(folder)
    data = os.urandom(1 << 20)
    started = time.monotonic()
    try:
        with open(path, "wb") as file:
            for _ in range(PROBE_BYTES >> 20):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return 2 * (time.monotonic() - started) / PROBE_BYTES
    finally:
        path.unlink(missing_ok=True)
