"""`moe-edge convert --calibrate`: what each type does to each expert, which expert gets which type, and what the
runtime may expect of a low or skipped expert.

The model runs once over a text (observe.py); everything else is arithmetic on one expert's weights and tokens at
a time. The source's own weights are the reference. Source of the idea: GEMQ, with the layers' weights measured by
disturbing their outputs instead of by gradients (PAPERS.md, section 5).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from moe_edge.convert.allocate import (
    Allocation,
    allocate_by_frequency,
    allocate_by_layer,
    allocate_global,
    allocate_uniform,
)
from moe_edge.convert.checkpoints import open_source
from moe_edge.convert.conversion_plan import ConvertPlan, ExpertTypes, make_plan
from moe_edge.convert.convert import ConvertReport, check_output, convert
from moe_edge.convert.imatrix import fill_unused, read_imatrix
from moe_edge.convert.quantize import dequantize, fitting_type, prepare, quantize, target_type
from moe_edge.convert.stacked import write_stacked
from moe_edge.convert.type_damage import (
    Activation,
    ColumnImportance,
    ExpertErrors,
    column_importance,
    expert_errors,
    expert_hidden,
    expert_output,
    find_activation,
)
from moe_edge.models.calibration import Calibration, Substitution
from moe_edge.models.errors import UsageError
from moe_edge.models.formats.floats import Float64Array, FloatArray
from moe_edge.models.formats.ggml_types import find_type, tensor_bytes
from moe_edge.models.formats.source_files import SourceFiles
from moe_edge.models.formats.work import WorkFolder
from moe_edge.models.store.calibration_keys import patch_settings
from moe_edge.models.store.experts import MatrixKey, MoELayer
from moe_edge.models.store.source import Source
from moe_edge.models.store.store import HIGH_NAME, LOW_NAME, store_path
from moe_edge.runner.calibrate.measured_settings import measure_settings
from moe_edge.runner.calibrate.observe import LayerView, Observed, observe
from moe_edge.runner.calibrate.substitution import measure_substitution
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.prove import prove

DEFAULT_TYPES = ("IQ2_XXS", "Q2_K", "IQ3_XXS", "Q3_K", "Q4_K", "Q6_K")
MOST_ROWS = 512  # of an expert's tokens, for its errors; more move them by a few per cent (docs/LOG.md)
REFERENCE_TYPE = "Q8_0"  # of the temporary model that a checkpoint is run as
QUANTILES = np.linspace(0, 1, 101)

Tell = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class CalibrateOptions:
    """text: to run the model on. n_tokens: how many of it; sensitivity_tokens: of those, for each layer's weight;
    settings_tokens: for the table behind --max-kld, 0 leaves it empty. types: to choose from when bits are wanted.
    imatrix: an importance matrix (GGUF) in place of our own. ram_bytes: for running the model. n_threads: for that, and
    to quantize.
    """

    text: Path
    types: tuple[str, ...] = DEFAULT_TYPES
    n_tokens: int = 16384
    sensitivity_tokens: int = 2048
    settings_tokens: int = 1024
    imatrix: Path | None = None
    ram_bytes: int | None = None
    n_threads: int = 0


def convert_calibrated(
    source_path: Path,
    output: Path,
    types: ExpertTypes,
    options: CalibrateOptions,
    *,
    bits: float | None = None,
    low_bits: float | None = None,
    dense_type: str | None = None,
    overwrite: bool = False,
    tell: Tell = lambda _: None,
    pack: str = "none",
) -> ConvertReport:
    """Convert with a calibration.

    bits, low_bits: average bits a weight of the experts' high and low level, whose types are then chosen from
    options.types; None: as `types` say. Raises what convert(), observe() and find_activation() raise, and UsageError
    for bits that the types cannot make.
    """
    source = open_source(source_path)
    check_output(output, source, overwrite)
    for wanted in (bits, low_bits):
        if wanted is not None:
            _check_bits(source, options.types, wanted)
    with Calibrator(source_path, output.parent, options, tell) as calibrator:
        if bits is not None:
            types = replace(types, homes=calibrator.allocate(bits))
        if low_bits is not None:
            types = replace(types, low_homes=calibrator.allocate(low_bits))
        return calibrator.convert(output, types, dense_type=dense_type, overwrite=overwrite, pack=pack)


def _check_bits(source: Source, types: Sequence[str], bits: float) -> None:
    """Raises UsageError, before hours of work, for bits that the smallest types do not reach."""
    shapes = [layer.shape(p) for layer in source.layers for p in layer.projections for _ in range(layer.n_expert)]
    kinds = [target_type(name, with_imatrix=True).id for name in types]
    least = sum(min(tensor_bytes(fitting_type(k, shape[0]), shape) for k in kinds) for shape in shapes)
    n_weights = sum(shape[0] * shape[1] for shape in shapes)
    if int(bits * n_weights / 8) < least:
        raise UsageError(
            f"--bits {bits:g}: the types {', '.join(types)} need at least {8 * least / n_weights:.4g} bits a weight"
        )


class Calibrator:
    """One source on one text: what was seen and measured, and conversions that use it. Use it in `with`.

    folder: for temporary files; a checkpoint is run as a Q8_0 there.
    """

    def __init__(self, source_path: Path, folder: Path, options: CalibrateOptions, tell: Tell = lambda _: None) -> None:
        self.source, self.source_path = open_source(source_path), source_path
        self.options, self.tell = options, tell
        self._folder = folder
        self._errors: dict[tuple[int, int], ExpertErrors] = {}
        self._substitution_known: Substitution | None = None
        self._substitution_measured = False
        find_activation(self.source.architecture.name, self.source.name)
        for name in options.types:
            target_type(name, with_imatrix=True)
        self.importance: dict[MatrixKey, FloatArray] = {}
        self.dense_importance: dict[str, FloatArray] = {}
        if options.imatrix:
            imatrix = read_imatrix(options.imatrix)
            self.importance = fill_unused(imatrix.expert_importance(self.source.layers), self.source.layers)
            self.dense_importance = imatrix.dense_importance()

    def __enter__(self) -> Calibrator:
        o = self.options
        with contextlib.ExitStack() as stack:
            reference = stack.enter_context(_reference(self.source, self.source_path, self._folder, self.tell))
            engine = EngineOptions(ram_bytes=o.ram_bytes, n_threads=o.n_threads)
            self.seen: Observed = stack.enter_context(
                observe(
                    reference, o.text, n_tokens=o.n_tokens, sensitivity_tokens=o.sensitivity_tokens, options=engine,
                    tell=self.tell,
                )
            )  # fmt: skip
            self._weights = stack.enter_context(_Weights(self.source, o.n_threads))
            if not self.importance:
                self._measure_importance()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _layers(self) -> Iterator[tuple[MoELayer, LayerView]]:
        return zip(self.source.layers, self.seen.layers, strict=True)

    def _measure_importance(self) -> None:
        for layer, view in self._layers():
            for expert, found in enumerate(self._weights.map(_Weights.importance, layer, view)):
                self.importance |= {(layer.layer, expert, p): found.of(p) for p in layer.projections}
            self.tell(f"importance: block {layer.layer}")
        self.importance = fill_unused(self.importance, self.source.layers)

    def errors(self) -> Mapping[tuple[int, int], ExpertErrors]:
        """(layer number, expert) -> errors of each of options.types for each projection alone; measured once."""
        if not self._errors:
            kinds = {p: [find_type(t).id for t in self.options.types] for p in ("up", "gate", "gate_up", "down")}
            prepare({each for some in kinds.values() for each in some})
            for layer, view in self._layers():
                found = self._weights.map(_Weights.errors, layer, view, kinds, None, self.importance)
                self._errors |= {(layer.layer, expert): each for expert, each in enumerate(found)}
                self.tell(f"errors: block {layer.layer}, {len(self.options.types)} types")
        return self._errors

    def allocate(self, bits: float, how: str = "global") -> dict[MatrixKey, int]:
        """(layer number, expert, projection) -> type id: the home precisions that make the wanted bits a weight.

        how: `global` is the product's; `layer`, `frequency` and `uniform` are there to be compared with.
        Raises UsageError when the types cannot make them.
        """
        return allocate(self.source, self.seen, self.errors(), self.options.types, bits, how)

    def convert(
        self, output: Path, types: ExpertTypes, *, dense_type: str | None = None, overwrite: bool = False,
        pack: str = "none",
    ) -> ConvertReport:  # fmt: skip
        """Convert with what was measured. Raises what convert() raises."""
        o = self.options
        plan = make_plan(self.source, types=types, dense_type=dense_type, importance=self.importance)
        calibration = replace(
            _result(self.source, self.seen, plan, self._measure_levels(plan)), substitution=self._substitution()
        )
        return convert(
            self.source_path, output, types=types, importance=self.importance, dense_importance=self.dense_importance,
            calibration=calibration, dense_type=dense_type, threads=o.n_threads or None, overwrite=overwrite,
            prove=self._prove_and_measure, pack=pack,
        )  # fmt: skip

    def _substitution(self) -> Substitution | None:
        """What another expert in the place of one costs; measured once."""
        if not self._substitution_measured and self.seen.rankings:
            self._substitution_known = measure_substitution(
                self.seen.rankings, lambda layer: self.seen.layers[layer].inputs,
                lambda layer, expert, x: self._weights.output(self.source.layers[layer], expert, x), self.seen.gating,
            )  # fmt: skip
            self._substitution_measured = True
            self.tell("substitution: all blocks")
        return self._substitution_known

    def _prove_and_measure(self, skeleton: Path) -> None:
        """The last part of a conversion: what it raises, an interrupt too, removes both files."""
        prove(skeleton, self.source_path)
        o = self.options
        if o.settings_tokens:
            settings = measure_settings(
                skeleton, o.text, n_tokens=o.settings_tokens,
                options=EngineOptions(ram_bytes=o.ram_bytes, n_threads=o.n_threads), tell=self.tell,
            )  # fmt: skip
            patch_settings(store_path(skeleton), settings)

    def _measure_levels(self, plan: ConvertPlan) -> dict[tuple[int, int], ExpertErrors]:
        """errors of each level of the store as it will be, all projections together."""
        planned = _planned_types(plan)
        prepare(set(planned.values()))
        levels: dict[tuple[int, int], ExpertErrors] = {}
        for layer, view in self._layers():
            found = self._weights.map(_Weights.errors, layer, view, {}, (planned, plan.levels), self.importance)
            levels |= {(layer.layer, expert): each for expert, each in enumerate(found)}
            self.tell(f"levels: block {layer.layer}")
        return levels


@contextlib.contextmanager
def _reference(source: Source, path: Path, folder: Path, tell: Tell) -> Iterator[Path]:
    """A model llama.cpp can run: the GGUF itself, or a temporary Q8_0 of a checkpoint beside the output."""
    if not source.is_checkpoint:
        yield path
        return
    with WorkFolder(folder, label="reference") as work:
        tell(f"writing the checkpoint as {REFERENCE_TYPE}, to run it")
        yield write_stacked(path, work.path / "reference.gguf", REFERENCE_TYPE)


class _Weights:
    """One expert's float weights at a time, on several threads."""

    def __init__(self, source: Source, threads: int) -> None:
        self._source = source
        self._activation: Activation = find_activation(source.architecture.name, source.name)
        self._files = SourceFiles()
        self._pool = ThreadPoolExecutor(threads or os.cpu_count() or 1)
        for path in source.files:
            self._files.open(path)

    def __enter__(self) -> _Weights:
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._files.__exit__(*error)

    def map(self, work: Callable[..., T], layer: MoELayer, *args: Any) -> Iterator[T]:
        """work(self, layer, expert, *args) for all experts of a layer, in order."""
        return self._pool.map(lambda expert: work(self, layer, expert, *args), range(layer.n_expert))

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
        x, g, _ = _some_rows(view, expert)
        return column_importance(x, expert_hidden(x, self.of(layer, expert), self._activation), g)

    def errors(
        self, layer: MoELayer, expert: int, view: LayerView, kinds: Mapping[str, Sequence[int]],
        levels: tuple[Mapping[tuple[int, int, str, str], int], Sequence[str]] | None,
        importance: Mapping[MatrixKey, FloatArray],
    ) -> ExpertErrors:  # fmt: skip
        """kinds: projection -> types to try alone. levels: planned types and the levels to try together."""
        planned, names = levels or ({}, ())
        assignments = [{p: planned[layer.layer, expert, p, name] for p in layer.projections} for name in names]
        x, g, scale = _some_rows(view, expert)
        reference = self.of(layer, expert)
        candidates: dict[str, dict[int, FloatArray]] = {}
        for projection in layer.projections:
            wanted = {*kinds.get(projection, ()), *(a[projection] for a in assignments if projection in a)}
            for kind in sorted(wanted):
                rows = reference[projection]
                fitting = fitting_type(kind, rows.shape[1])
                data = quantize(rows, fitting, importance.get((layer.layer, expert, projection)))
                candidates.setdefault(projection, {})[kind] = dequantize(data, fitting, rows.shape[1])
        tried = {p: {k: w for k, w in found.items() if k in kinds.get(p, ())} for p, found in candidates.items()}
        single = expert_errors(x, g, reference, tried, self._activation)
        joint = expert_errors(x, g, reference, candidates, self._activation, assignments).joint if assignments else ()
        return ExpertErrors(
            {p: {k: v * scale for k, v in kinds.items()} for p, kinds in single.single.items()},
            tuple(v * scale for v in joint),
            single.removed * scale,
        )


def _some_rows(view: LayerView, expert: int) -> tuple[FloatArray, FloatArray, float]:
    """(inputs, gate weights, what their sums must be multiplied by) of at most MOST_ROWS evenly spread tokens."""
    x, g = view.rows_of(expert)
    if len(g) <= MOST_ROWS:
        return x, g, 1.0
    chosen = np.linspace(0, len(g) - 1, MOST_ROWS).astype(np.int64)
    kept = float(np.square(g[chosen]).sum())
    return x[chosen], g[chosen], float(np.square(g).sum()) / kept if kept > 0 else 1.0


def _planned_types(plan: ConvertPlan) -> dict[tuple[int, int, str, str], int]:
    """(layer number, expert, projection, level) -> type of the store's tensor."""
    found = {}
    for each in plan.experts:  # blk.3.ffn_up_exps.7.low.weight
        _, layer, name, expert, *level = each.name.split(".")
        projection = name.removeprefix("ffn_").removesuffix("_exps")
        found[int(layer), int(expert), projection, LOW_NAME if level[0] == LOW_NAME else HIGH_NAME] = each.type
    return found


def allocate(
    source: Source, seen: Observed, errors: Mapping[tuple[int, int], ExpertErrors], types: Sequence[str], bits: float,
    how: str,
) -> dict[MatrixKey, int]:  # fmt: skip
    """See Calibrator.allocate; types: names of those to choose from."""
    kinds = [find_type(name).id for name in types]
    keys: list[MatrixKey] = []
    cost: list[list[float]] = []
    sizes: list[list[int]] = []
    layer_of: list[int] = []
    counts: list[int] = []
    n_weights = 0
    for position, (layer, view) in enumerate(zip(source.layers, seen.layers, strict=True)):
        used = np.bincount(view.experts.ravel(), minlength=layer.n_expert)
        once = _cost_of_one_use(layer, used, errors, kinds)
        for expert in range(layer.n_expert):
            for projection in layer.projections:
                shape = layer.shape(projection)
                single = errors[layer.layer, expert].single[projection] if used[expert] else once[projection]
                keys.append((layer.layer, expert, projection))
                cost.append([single[k] * float(seen.sensitivity[position]) for k in kinds])
                sizes.append([tensor_bytes(fitting_type(k, shape[0]), shape) for k in kinds])
                layer_of.append(position)
                counts.append(int(used[expert]))
                n_weights += shape[0] * shape[1]
    budget = int(bits * n_weights / 8)
    costs, bytes_ = np.array(cost), np.array(sizes, np.int64)
    try:
        made = _allocations(costs, bytes_, budget, np.array(layer_of), np.array(counts))[how]()
    except UsageError as error:
        least = 8 * int(bytes_.min(axis=1).sum()) / n_weights
        raise UsageError(
            f"--bits {bits:g}: the types {', '.join(types)} need at least {least:.4g} bits a weight"
        ) from error
    return {key: kinds[choice] for key, choice in zip(keys, made.choice.tolist(), strict=True)}


def _cost_of_one_use(
    layer: MoELayer, used: npt.NDArray[np.int64], errors: Mapping[tuple[int, int], ExpertErrors], kinds: Sequence[int]
) -> dict[str, dict[int, float]]:
    """For experts the text never used: projection -> type -> the layer's median error of a single use.

    At no cost they would get the smallest type whatever it does to them when another text does use them.
    """
    seen = np.flatnonzero(used).tolist()
    return {
        p: {k: float(np.median([errors[layer.layer, e].single[p][k] / used[e] for e in seen])) for k in kinds}
        for p in layer.projections
    }


def _allocations(
    cost: Float64Array, bytes_: npt.NDArray[np.int64], budget: int, layer_of: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
) -> dict[str, Callable[[], Allocation]]:  # fmt: skip
    return {
        "global": lambda: allocate_global(cost, bytes_, budget),
        "layer": lambda: allocate_by_layer(cost, bytes_, budget, layer_of),
        "frequency": lambda: allocate_by_frequency(cost, bytes_, budget, counts),
        "uniform": lambda: allocate_uniform(cost, bytes_, budget),
    }


def _result(
    source: Source, seen: Observed, plan: ConvertPlan, levels: Mapping[tuple[int, int], ExpertErrors]
) -> Calibration:
    n_layers, n_experts = len(source.layers), max(layer.n_expert for layer in source.layers)
    counts = np.zeros((n_layers, n_experts), np.int64)
    gates, squares = np.zeros((n_layers, n_experts)), np.zeros((n_layers, n_experts))
    error = np.zeros((n_layers, n_experts, len(plan.levels) + 1))
    for i, (layer, view) in enumerate(zip(source.layers, seen.layers, strict=True)):
        chosen, g = view.experts.ravel(), view.weights.ravel().astype(np.float64)
        counts[i] = np.bincount(chosen, minlength=n_experts)
        gates[i] = np.bincount(chosen, g, n_experts) / np.maximum(1, counts[i])
        squares[i] = np.bincount(chosen, g * g, n_experts)
        for expert in range(layer.n_expert):
            found = levels[layer.layer, expert]
            error[i, expert] = [*found.joint, found.removed]
    plain = Calibration(
        text_sha256=seen.text_sha256, n_tokens=seen.n_tokens, levels=plan.levels, counts=counts, mean_gate=gates,
        squares=squares, sensitivity=seen.sensitivity, error=error, cumulated=cumulated_quantiles(seen.layers),
        use_damage=np.zeros((n_layers, len(QUANTILES))),
    )  # fmt: skip
    unit = plain.unit_damage(1 if len(plan.levels) > 1 else -1)
    damage = [np.square(v.weights.astype(np.float64)) * unit[i][v.experts] for i, v in enumerate(seen.layers)]
    return replace(plain, use_damage=np.stack([np.quantile(d, QUANTILES) for d in damage]))


def cumulated_quantiles(layers: Sequence[LayerView]) -> Float64Array:
    """[101]: quantiles over all uses of the share of the token's gate weight that larger ones have: HOBBIT's s(e_i)."""
    shares = []
    for view in layers:
        g = -np.sort(-view.weights.astype(np.float64), axis=1)
        before = np.cumsum(g, axis=1) - g
        shares.append((before / np.maximum(g.sum(axis=1, keepdims=True), 1e-30)).ravel())
    quantiles: Float64Array = np.quantile(np.concatenate(shares), QUANTILES)
    return quantiles

