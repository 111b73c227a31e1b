"""One expert's float weights at a time, on several threads: its importance, and what types do to it.

Large matrices are tried on some of their rows (convert/type_damage.py, rows_to_sample).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from moe_edge.convert.quantize import dequantize, fitting_type, quantize
from moe_edge.convert.type_damage import (
    Activation,
    Assignment,
    ColumnImportance,
    ExpertErrors,
    IntArray,
    column_importance,
    expert_errors,
    expert_hidden,
    expert_output,
    find_activation,
    rows_to_sample,
    sampled_errors,
)
from moe_edge.models.formats.floats import FloatArray
from moe_edge.models.formats.source_files import SourceFiles
from moe_edge.models.store.experts import MatrixKey, MoELayer
from moe_edge.models.store.source import Source
from moe_edge.runner.calibrate.observe import LayerView
from moe_edge.runner.memory import auto_budget_bytes
from threadpoolctl import threadpool_limits

MOST_ROWS = 512  # of an expert's tokens, for its errors; more move them by a few per cent (docs/LOG.md)
# Of an expert in floats: with each type tried on all rows, or on some; and what is computed from them.
WHOLE_COPIES, SAMPLED_COPIES = 8, 2
T = TypeVar("T")


class ExpertWeights:
    """A source's experts; use it in `with`.

    ram_bytes: of which a quarter is for what the threads work on, so that fewer work on large experts; None: `auto`.
    """

    def __init__(self, source: Source, threads: int, ram_bytes: int | None = None) -> None:
        self._source = source
        self._activation: Activation = find_activation(source.architecture.name, source.name)
        self._files = SourceFiles()
        each = max((_working_bytes(layer) for layer in source.layers), default=1)
        most = (auto_budget_bytes() if ram_bytes is None else ram_bytes) // 4
        self.n_threads = max(1, min(threads or os.cpu_count() or 1, most // each))
        self.working_bytes = self.n_threads * each
        self._pool = ThreadPoolExecutor(self.n_threads)
        for path in source.files:
            self._files.open(path)

    def __enter__(self) -> ExpertWeights:
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._files.__exit__(*error)

    def map(
        self, work: Callable[..., T], layer: MoELayer, *args: Any, experts: Sequence[int] | None = None
    ) -> Iterator[T]:
        """work(self, layer, expert, *args) for experts of a layer, by default all, in order.

        One at a time: until it is at its end, numpy multiplies with one thread in the whole process.
        """
        asked = range(layer.n_expert) if experts is None else experts
        with threadpool_limits(1, user_api="blas"):  # each thread has an expert of its own; more threads only spin
            yield from self._pool.map(lambda expert: work(self, layer, expert, *args), asked)

    def of(self, layer: MoELayer, expert: int) -> dict[str, FloatArray]:
        """projection -> (n_rows, n_cols)."""
        found = {}
        for projection in layer.projections:
            entry = self._source.experts[layer.layer, expert, projection]
            data = self._files.read(entry, 0, entry.nbytes)
            found[projection] = dequantize(data, entry.type, entry.shape[0])
        return found

    def output(self, layer: MoELayer, expert: int, x: FloatArray) -> FloatArray:
        """(n, n_embd): the expert's output, without its gate weight."""
        return expert_output(x, self.of(layer, expert), self._activation)

    def importance(self, layer: MoELayer, expert: int, view: LayerView) -> ColumnImportance:
        x, g, _ = some_rows(view, expert)
        return column_importance(x, expert_hidden(x, self.of(layer, expert), self._activation), g)

    def errors(
        self, layer: MoELayer, expert: int, view: LayerView, kinds: Mapping[str, Sequence[int]],
        assignments: Sequence[Assignment], importance: Mapping[MatrixKey, FloatArray],
    ) -> ExpertErrors:  # fmt: skip
        """kinds: projection -> types to try alone. assignments: types of all projections, to try together."""
        x, g, scale = some_rows(view, expert)
        reference = self.of(layer, expert)
        sampled = _sampled_rows(reference)
        candidates: dict[str, dict[int, FloatArray]] = {}
        for projection in layer.projections:
            together = (a.get(projection) for a in assignments)
            wanted = {*kinds.get(projection, ()), *(kind for kind in together if kind is not None)}
            rows = reference[projection] if sampled is None else reference[projection][sampled[projection]]
            mine = importance.get((layer.layer, expert, projection))
            candidates[projection] = {kind: _there_and_back(rows, kind, mine) for kind in sorted(wanted)}
        found = self._errors(x, g, reference, sampled, candidates, kinds, assignments)
        return ExpertErrors(
            {p: {k: v * scale for k, v in kinds.items()} for p, kinds in found.single.items()},
            tuple(v * scale for v in found.joint),
            found.removed * scale,
        )

    def tried(
        self, layer: MoELayer, expert: int, kinds: Mapping[str, Sequence[int]], importance: Mapping[str, FloatArray]
    ) -> tuple[dict[str, FloatArray], dict[str, IntArray], dict[str, dict[int, FloatArray]]]:
        """(weights, projection -> rows, projection -> type -> those rows at the type), the rows all of a small one."""
        reference = self.of(layer, expert)
        rows = _sampled_rows(reference) or {p: np.arange(len(w)) for p, w in reference.items()}
        candidates = {
            p: {kind: _there_and_back(w[rows[p]], kind, importance.get(p)) for kind in kinds[p]}
            for p, w in reference.items()
        }
        return reference, rows, candidates

    def _errors(
        self, x: FloatArray, g: FloatArray, reference: Mapping[str, FloatArray], sampled: Mapping[str, IntArray] | None,
        candidates: Mapping[str, Mapping[int, FloatArray]], kinds: Mapping[str, Sequence[int]],
        assignments: Sequence[Assignment],
    ) -> ExpertErrors:  # fmt: skip
        tried = {p: {k: w for k, w in found.items() if k in kinds.get(p, ())} for p, found in candidates.items()}
        if sampled is not None:
            single = sampled_errors(x, g, reference, sampled, tried, self._activation)
            if not assignments:
                return single
            joint = sampled_errors(x, g, reference, sampled, candidates, self._activation, assignments).joint
        else:
            single = expert_errors(x, g, reference, tried, self._activation)
            if not assignments:
                return single
            joint = expert_errors(x, g, reference, candidates, self._activation, assignments).joint
        return ExpertErrors(single.single, joint, single.removed)


def _working_bytes(layer: MoELayer) -> int:
    """What one thread takes to try types on one of a layer's experts."""
    shapes = [layer.shape(p) for p in layer.projections]
    is_whole = all(rows_to_sample(rows, cols) is None for cols, rows in shapes)
    return 4 * sum(rows * cols for rows, cols in shapes) * (WHOLE_COPIES if is_whole else SAMPLED_COPIES)


def _there_and_back(rows: FloatArray, kind: int, importance: FloatArray | None) -> FloatArray:
    fitting = fitting_type(kind, rows.shape[1])
    return dequantize(quantize(rows, fitting, importance), fitting, rows.shape[1])


def _sampled_rows(reference: Mapping[str, FloatArray]) -> dict[str, IntArray] | None:
    """projection -> rows to try types on; None when the expert is small enough to be taken whole."""
    found = {p: rows_to_sample(*w.shape) for p, w in reference.items()}
    if all(rows is None for rows in found.values()):
        return None
    whole = {p: np.arange(w.shape[0]) if (rows := found[p]) is None else rows for p, w in reference.items()}
    if "gate_up" in whole:
        n_ff = reference["gate_up"].shape[0] // 2
        half = rows_to_sample(n_ff, reference["gate_up"].shape[1])
        units = np.arange(n_ff) if half is None else half
        whole["gate_up"] = np.concatenate([units, units + n_ff])
    return whole


def some_rows(view: LayerView, expert: int) -> tuple[FloatArray, FloatArray, float]:
    """(inputs, gate weights, what their sums must be multiplied by) of at most MOST_ROWS evenly spread tokens."""
    x, g = view.rows_of(expert)
    if len(g) <= MOST_ROWS:
        return x, g, 1.0
    chosen = np.linspace(0, len(g) - 1, MOST_ROWS).astype(np.int64)
    kept = float(np.square(g[chosen]).sum())
    return x[chosen], g[chosen], float(np.square(g).sum()) / kept if kept > 0 else 1.0
