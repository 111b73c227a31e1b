"""`moe-edge convert --calibrate`: what each type does to each expert, which expert gets which type, and what the
runtime may expect of a low or skipped expert.

The model runs once over a text (observe.py); everything else is arithmetic on one expert's weights and tokens at
a time. The source's own weights are the reference. Source of the idea: GEMQ, with the layers' weights measured by
disturbing their outputs instead of by gradients (PAPERS.md, section 5). What is found is kept in a journal beside the
output, layer by layer, until the conversion is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from moe_edge.convert.checkpoints import open_source
from moe_edge.convert.conversion_plan import ConvertPlan, ExpertTypes, make_plan
from moe_edge.convert.convert import ConvertReport, check_output, convert
from moe_edge.convert.imatrix import fill_unused, read_imatrix
from moe_edge.convert.quantize import prepare, target_type
from moe_edge.convert.quantizing_time import CORE_HOURS, used_types
from moe_edge.convert.stacked import write_stacked
from moe_edge.convert.type_damage import ExpertErrors, find_activation, rows_to_sample
from moe_edge.models.calibration import Substitution
from moe_edge.models.formats.floats import Float64Array, FloatArray
from moe_edge.models.formats.work import WorkFolder, whole
from moe_edge.models.store.calibration_keys import patch_settings
from moe_edge.models.store.experts import MatrixKey, MoELayer
from moe_edge.models.store.source import Source, n_expert_used
from moe_edge.models.store.store import store_path
from moe_edge.runner.calibrate.choose_types import Choices, check_bits, choices_of, measured_choices
from moe_edge.runner.calibrate.expert_weights import ExpertWeights
from moe_edge.runner.calibrate.forecast import Forecast
from moe_edge.runner.calibrate.journal import Arrays, Journal, WrittenLayers, identity_of_run, journal_folder
from moe_edge.runner.calibrate.measured_settings import measure_settings
from moe_edge.runner.calibrate.observe import CHUNK, LayerView, Timed, recall, run_on_text
from moe_edge.runner.calibrate.rehearse import SETTINGS, Rehearsal
from moe_edge.runner.calibrate.substitution import measure_substitution
from moe_edge.runner.calibrate.summary import calibration_of, planned_types, settings_from, settings_text
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.hub.download import exclusive
from moe_edge.runner.measure.logits import read_text
from moe_edge.runner.prove import prove

DEFAULT_TYPES = ("IQ2_XXS", "Q2_K", "IQ3_XXS", "Q3_K", "Q4_K", "Q6_K")
REFERENCE_TYPE = "Q8_0"  # of the temporary model that a checkpoint is run as
RATES, SETTINGS_KEPT = "rates.json", "settings.json"
PILOT_EXPERTS = 16  # of three layers, whose errors say which types are hopeless
TOKEN_LAYERS = 8192  # of one setting: a deep model's settings are measured on fewer tokens
LEAST_TOKENS = 512

Tell = Callable[[str], None]


@dataclass(frozen=True)
class CalibrateOptions:
    """text: to run the model on. n_tokens: how many of it; sensitivity_tokens: of those, for each layer's weight;
    settings_tokens: for the table behind --max-kld, 0 leaves it empty; a deep model gets fewer of both. types: to
    choose from when bits are wanted. imatrix: an importance matrix (GGUF) in place of our own. ram_bytes: for running
    the model. n_threads: for that, and to quantize. core_hours: of quantizing to the types chosen, nominal, at most.
    """

    text: Path
    types: tuple[str, ...] = DEFAULT_TYPES
    n_tokens: int = 16384
    sensitivity_tokens: int = 2048
    settings_tokens: int = 1024
    imatrix: Path | None = None
    ram_bytes: int | None = None
    n_threads: int = 0
    core_hours: float = CORE_HOURS


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
    options.types; None: as `types` say. However it is stopped, what was found stays beside the output, and the same
    call goes on from there. Raises what convert(), run_on_text() and find_activation() raise, and UsageError for bits
    that the types cannot make.
    """
    source = open_source(source_path)
    find_activation(source.architecture.name, source.name)
    whole(output.parent, lambda: None)
    check_output(output, source, overwrite)
    wanted = [each for each in (bits, low_bits) if each is not None]
    for each in wanted:
        check_bits(source, options.types, each)
    text = read_text(options.text)
    asked = repr((replace(options, text=Path(), imatrix=None, ram_bytes=None, n_threads=0), types, bits, low_bits,
                  dense_type, pack))  # fmt: skip
    with exclusive(output.with_name(output.name + ".moe-edge-lock")):
        journal = Journal(journal_folder(output), identity_of_run(source, text, asked, options.imatrix))
        try:
            with Calibrator(source_path, output.parent, options, tell, journal=journal) as calibrator:
                low: list[str | None] = [types.low] if types.low is not None and low_bits is None else []
                calibrator.measure(wanted, ([types.high] if bits is None else []) + low)
                chosen = iter(calibrator.allocate_levels(wanted))
                if bits is not None:
                    types = replace(types, homes=next(chosen))
                if low_bits is not None:
                    types = replace(types, low_homes=next(chosen))
                made = calibrator.convert(output, types, dense_type=dense_type, overwrite=overwrite, pack=pack)
        except BaseException:
            journal.remove_empty()
            raise
        journal.remove()
    return made


class Calibrator:
    """One source on one text: what was seen and measured, and conversions that use it. Use it in `with`, and call
    measure() before the rest when the time it takes is to be told beforehand.

    folder: for temporary files; a checkpoint is run as a Q8_0 there. journal: where what is found stays; None: in the
    folder, until the end.
    """

    def __init__(
        self, source_path: Path, folder: Path, options: CalibrateOptions, tell: Tell = lambda _: None,
        journal: Journal | None = None,
    ) -> None:  # fmt: skip
        self.source, self.source_path = open_source(source_path), source_path
        self.options, self.tell = options, tell
        self.types = options.types
        self._folder, self._journal, self._is_kept = folder, journal, journal is not None
        self._errors: dict[tuple[int, int], ExpertErrors] = {}
        self._bits: tuple[float, ...] = ()
        self._fixed: tuple[str | None, ...] = (None,)
        self._forecast = Forecast()
        self._text = read_text(options.text)
        find_activation(self.source.architecture.name, self.source.name)
        for name in options.types:
            target_type(name, with_imatrix=True)
        self.importance: dict[MatrixKey, FloatArray] = {}
        self.dense_importance: dict[str, FloatArray] = {}
        if options.imatrix:
            imatrix = read_imatrix(options.imatrix)
            self.importance = fill_unused(imatrix.expert_importance(self.source.layers), self.source.layers)
            self.dense_importance = imatrix.dense_importance()
        self._is_given = bool(self.importance)

    def __enter__(self) -> Calibrator:
        with contextlib.ExitStack() as stack:
            if self._journal is None:
                made = tempfile.TemporaryDirectory(prefix="moe-edge-calibrate-", ignore_cleanup_errors=True)
                self._journal = Journal(Path(stack.enter_context(made)))
            o = self.options
            self._weights = stack.enter_context(ExpertWeights(self.source, o.n_threads, o.ram_bytes))
            if not self._is_kept:
                self.measure()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def measure(self, bits: Sequence[float] = (), fixed: Sequence[str | None] = (None,)) -> None:
        """Run the model on the text, find the importance and, when bits are wanted, the errors of types.

        bits: of the levels whose types will be chosen. fixed: types of the other levels, None as the source has them.
        The forecast that is told is of a conversion to these.
        """
        self._bits, self._fixed = tuple(bits), tuple(fixed)
        source, journal, forecast = self.source, self._kept, self._forecast
        n_experts = sum(layer.n_expert for layer in source.layers)
        forecast.read(journal.read_text(RATES))
        for stage, units in (("experts", n_experts), ("levels", n_experts), ("substitution", len(source.layers))):
            forecast.plan(stage, units)
        n_settings = SETTINGS[len(self._bits) + len(self._fixed)] if self.options.settings_tokens else 0
        forecast.plan("settings", n_settings)
        forecast.plan("writing", self._expected_bytes())
        widths = [layer.n_embd for layer in source.layers]
        sha256 = hashlib.sha256(self._text).hexdigest()
        seen = recall(journal, widths, sha256)
        if seen is None:
            forecast.begin()
            with _reference(source, self.source_path, self._folder, self.tell) as reference:
                o = self.options
                run_on_text(
                    reference, self._text, journal, _Told(self), n_tokens=o.n_tokens,
                    n_sensitivity_tokens=o.sensitivity_tokens, options=self._engine_options(True),
                )  # fmt: skip
            seen = recall(journal, widths, sha256)
            assert seen is not None, "what was run is in the journal"
        elif self._is_kept:
            self.tell(f"the text has been run; {journal.folder} has what was seen")
        self.seen = seen
        self._counts = [
            np.bincount(view.experts.ravel(), minlength=layer.n_expert) for layer, view in self._layers()
        ]  # fmt: skip
        if self._is_kept and forecast.is_known:
            self.tell(forecast.text())
        self._measure_experts()

    @property
    def _kept(self) -> Journal:
        assert self._journal is not None, "inside `with`"
        return self._journal

    def _engine_options(self, trying_types: bool = False) -> EngineOptions:
        o, beside = self.options, self._weights.working_bytes if trying_types else 0
        return EngineOptions(ram_bytes=o.ram_bytes, n_threads=o.n_threads, charge_program=True, beside_bytes=beside)

    def _expected_bytes(self) -> int:
        """Of the store, before its types are chosen."""
        weights = {
            p: sum(layer.shape(p)[0] * layer.shape(p)[1] * layer.n_expert for layer in self.source.layers
                   if p in layer.projections) for p in ("up", "gate", "gate_up", "down")
        }  # fmt: skip
        chosen = sum(bits * sum(weights.values()) / 8 for bits in self._bits)
        for name in self._fixed:
            kept = sum(each.nbytes for each in self.source.experts.values())
            kind = None if name is None else target_type(name, with_imatrix=True)
            chosen += kept if kind is None else sum(weights.values()) * kind.block_bytes / kind.block
        return int(chosen)

    def rehearse(self, timed: Timed, n_tokens: int) -> None:
        """Time what is to come, and tell how long all of it will take."""
        rehearsal = Rehearsal(
            self.source, self._weights, self._bits, self.types, self._fixed, self.options.core_hours * 3600, n_tokens,
            n_expert_used(self.source.kv, self.source.name), self._settings_tokens(),
        )  # fmt: skip
        self._forecast.know(rehearsal.seconds(timed, self._kept.folder))
        self._kept.write_text(RATES, self._forecast.to_json())
        if self._is_kept:
            self.tell(self._forecast.text())
        self._forecast.begin()

    def step(self, stage: str, line: str, units: float = 1.0) -> None:
        """Some of a stage is done."""
        self._forecast.step(stage, units)
        self.tell(line + (self._forecast.suffix() if self._is_kept else ""))

    def _layers(self) -> Iterator[tuple[MoELayer, LayerView]]:
        """One at a time: what a layer saw is in a file, whose pages are given back before the next."""
        for layer, view in zip(self.source.layers, self.seen.layers, strict=True):
            yield layer, view
            view.forget()

    def _measure_experts(self) -> None:
        """Importance of all experts, and errors of types when some are to be chosen among."""
        self._forecast.begin()
        self.types = self.options.types
        for layer, view in self._layers():
            if not self._is_given:
                self._find_importance(layer, view)
        if self._bits:
            self._drop_hopeless()
            self.errors()

    def _find_importance(self, layer: MoELayer, view: LayerView) -> None:
        def find() -> Arrays:
            found = list(self._weights.map(ExpertWeights.importance, layer, view))
            return {"inputs": np.stack([e.inputs for e in found]), "hidden": np.stack([e.hidden for e in found])}

        found = self._kept.found(f"importance-{layer.layer:04}", find)
        mine = {
            (layer.layer, expert, p): found["hidden" if p == "down" else "inputs"][expert]
            for expert in range(layer.n_expert) for p in layer.projections
        }  # fmt: skip
        self.importance |= fill_unused(mine, [layer])
        self.step("experts", f"importance: block {layer.layer}", layer.n_expert * (0.1 if self._bits else 1.0))

    def _layer_errors(self, layer: MoELayer, view: LayerView) -> dict[tuple[int, int], ExpertErrors]:
        kinds = [target_type(name, with_imatrix=True).id for name in self.types]
        asked = dict.fromkeys(layer.projections, kinds)
        prepare(set(kinds))

        def find() -> Arrays:
            found = list(self._weights.map(ExpertWeights.errors, layer, view, asked, (), self.importance))
            single = [[[each.single[p][k] for k in kinds] for p in layer.projections] for each in found]
            return {"single": np.array(single), "removed": np.array([each.removed for each in found])}

        kept = self._kept.found(f"errors-{layer.layer:04}-{_digest(kinds)}", find)
        return {
            (layer.layer, expert): ExpertErrors(
                {p: dict(zip(kinds, row.tolist(), strict=True))
                 for p, row in zip(layer.projections, kept["single"][expert], strict=True)},
                (), float(kept["removed"][expert]),
            )
            for expert in range(layer.n_expert)
        }  # fmt: skip

    def _drop_hopeless(self) -> None:
        """Of large experts, try no type on all that no expert of a few layers would be given."""
        layers = list(zip(self.source.layers, self.seen.layers, strict=True))
        if all(rows_to_sample(*reversed(layer.shape(p))) is None for layer, _ in layers for p in layer.projections):
            return
        chosen, cost, uses = [], [], []
        kinds = [target_type(name, with_imatrix=True).id for name in self.types]
        prepare(set(kinds))
        for position in sorted({0, len(layers) // 2, len(layers) - 1}):
            layer, view = layers[position]
            used = np.flatnonzero(self._counts[position])
            experts = used[np.linspace(0, len(used) - 1, min(len(used), PILOT_EXPERTS)).astype(np.int64)].tolist()
            asked = dict.fromkeys(layer.projections, kinds)
            found = self._weights.map(ExpertWeights.errors, layer, view, asked, (), self.importance, experts=experts)
            cost.append([each.single for each in found])
            view.forget()
            chosen.append(replace(layer, n_expert=len(experts)))
            uses.append(np.ones(len(experts), np.int64))
            weight = float(self.seen.sensitivity[position])
            cost[-1] = [{p: {k: v * weight for k, v in row.items()} for p, row in each.items()} for each in cost[-1]]
        pilot = choices_of(self.source, chosen, self.types, lambda i, e, p, k: cost[i][e][p][k], uses)
        share = pilot.n_weights / sum(np.prod(each.shape) for each in self.source.experts.values())
        limit = self.options.core_hours * 3600 * float(share)
        useful = used_types([pilot.wanted(bits) for bits in self._bits], limit)
        self.types = tuple(self.types[i] for i in useful.tolist())
        if dropped := [name for name in self.options.types if name not in self.types]:
            self.tell(f"types: {', '.join(dropped)} left out: no expert of {len(chosen)} layers would get them")

    def errors(self) -> Mapping[tuple[int, int], ExpertErrors]:
        """(layer number, expert) -> errors of each of the types for each projection alone; measured once."""
        if not self._errors:
            for layer, view in self._layers():
                self._errors |= self._layer_errors(layer, view)
                self.step("experts", f"errors: block {layer.layer}, {len(self.types)} types", layer.n_expert * 0.9)
        return self._errors

    def _choices(self) -> Choices:
        return measured_choices(self.source, self.seen.sensitivity, self.errors(), self.types, self._counts)

    def allocate(self, bits: float, how: str = "global") -> dict[MatrixKey, int]:
        """(layer number, expert, projection) -> type id: the home precisions that make the wanted bits a weight.

        how: `global` is the product's; `layer`, `frequency` and `uniform` are there to be compared with.
        Raises UsageError when the types cannot make them.
        """
        return self._choices().choose(bits, how)

    def allocate_levels(self, bits: Sequence[float]) -> tuple[dict[MatrixKey, int], ...]:
        """The same of several levels, that are quantized in the time there is for all of them."""
        if not bits:
            return ()
        found, note = self._choices().choose_in_time(bits, self.options.core_hours * 3600)
        if note:
            self.tell(note)
        return found

    def convert(
        self, output: Path, types: ExpertTypes, *, dense_type: str | None = None, overwrite: bool = False,
        pack: str = "none",
    ) -> ConvertReport:  # fmt: skip
        """Convert with what was measured. Raises what convert() raises."""
        o = self.options
        plan = make_plan(self.source, types=types, dense_type=dense_type, importance=self.importance)
        self._forecast.begin()
        calibration = replace(
            calibration_of(self.source, self.seen, plan, self._measure_levels(plan)), substitution=self._substitution()
        )
        written = WrittenLayers(self._kept) if self._is_kept and pack == "none" else None
        return convert(
            self.source_path, output, types=types, importance=self.importance, dense_importance=self.dense_importance,
            calibration=calibration, dense_type=dense_type, threads=o.n_threads or None, overwrite=overwrite,
            prove=self._prove_and_measure, pack=pack, arriving=written,
            progress=self._writing(plan, written) if self._is_kept else None,
        )  # fmt: skip

    def _writing(self, plan: ConvertPlan, written: WrittenLayers | None) -> Callable[[int, int], None]:
        """Progress of the writing, told now and then."""
        at = 0
        sizes = [each.nbytes for each in (*plan.store_tensors, *plan.dense)]

        def progress(done: int, total: int) -> None:
            nonlocal at
            if not at:
                before = sum(sizes[: written.n_before]) if written else 0
                self._forecast.plan("writing", total, before)
            self._forecast.step("writing", done - at)
            at = done
            stage = self._forecast.stages["writing"]
            if suffix := self._forecast.suffix():
                self.tell(f"writing: {100 * stage.done / max(1, stage.units):.0f} %{suffix}")

        return progress

    def _substitution(self) -> Substitution | None:
        """What another expert in the place of one costs; measured once."""
        if not self.seen.rankings:
            return None

        def kept(layer: int, find: Callable[[], Float64Array]) -> Float64Array:
            found = self._kept.found(f"substitution-{layer:04}", lambda: {"factor": find()})["factor"]
            self.seen.layers[layer].forget()
            self._forecast.step("substitution")
            return found

        found = measure_substitution(
            self.seen.rankings, lambda layer: self.seen.layers[layer].inputs,
            lambda layer, expert, x: self._weights.output(self.source.layers[layer], expert, x), self.seen.gating, kept,
        )  # fmt: skip
        self.tell("substitution: all blocks" + (self._forecast.suffix() if self._is_kept else ""))
        return found

    def _settings_tokens(self) -> int:
        return min(self.options.settings_tokens, max(LEAST_TOKENS, TOKEN_LAYERS // len(self.source.layers)))

    def _prove_and_measure(self, skeleton: Path) -> None:
        """The last part of a conversion: what it raises, an interrupt too, removes both files."""
        self._forecast.begin()
        prove(skeleton, self.source_path)
        if not self.options.settings_tokens:
            return

        rows = settings_from(self._kept.read_text(SETTINGS_KEPT)) if self._is_kept else None
        if rows is None:
            rows = measure_settings(
                skeleton, self.options.text, n_tokens=self._settings_tokens(), options=self._engine_options(),
                tell=lambda line: self.step("settings", line),
            )  # fmt: skip
            if self._is_kept:
                self._kept.write_text(SETTINGS_KEPT, settings_text(rows))
        patch_settings(store_path(skeleton), rows)

    def _measure_levels(self, plan: ConvertPlan) -> dict[tuple[int, int], ExpertErrors]:
        """errors of each level of the store as it will be, all projections together."""
        planned = planned_types(plan)
        prepare(set(planned.values()))
        levels: dict[tuple[int, int], ExpertErrors] = {}
        for layer, view in self._layers():
            mine = [
                [{p: planned[layer.layer, expert, p, name] for p in layer.projections} for name in plan.levels]
                for expert in range(layer.n_expert)
            ]
            levels |= self._layer_levels(layer, view, mine)
            self.step("levels", f"levels: block {layer.layer}", layer.n_expert)
        return levels

    def _layer_levels(
        self, layer: MoELayer, view: LayerView, planned: Sequence[Sequence[Mapping[str, int]]]
    ) -> dict[tuple[int, int], ExpertErrors]:
        def work(weights: ExpertWeights, layer: MoELayer, expert: int) -> ExpertErrors:
            return weights.errors(layer, expert, view, {}, planned[expert], self.importance)

        def find() -> Arrays:
            found = list(self._weights.map(work, layer))
            return {"joint": np.array([e.joint for e in found]), "removed": np.array([e.removed for e in found])}

        kept = self._kept.found(f"levels-{layer.layer:04}-{_digest(planned)}", find)
        return {
            (layer.layer, expert): ExpertErrors({}, tuple(row), removed)
            for expert, (row, removed) in enumerate(zip(kept["joint"].tolist(), kept["removed"].tolist(), strict=True))
        }


class _Told:
    """Carries what a run of the model says to the calibration it is for."""

    def __init__(self, of: Calibrator) -> None:
        self._of = of
        self._n_tokens = 0

    def planned(self, n_chunks: int, n_done: int, n_sensitivity: int, n_known: int) -> None:
        self._n_tokens = n_chunks * CHUNK
        self._of._forecast.plan("watching", n_chunks, n_done)
        self._of._forecast.plan("sensitivity", n_sensitivity, n_known)
        if self._of._is_kept and self._of._forecast.is_known:
            self._of.tell(self._of._forecast.text())

    def timed(self, found: Timed) -> None:
        if self._of._is_kept:
            self._of.rehearse(found, self._n_tokens)

    def step(self, stage: str, line: str, units: float) -> None:
        self._of.step(stage, line, units)


def _digest(of: Any) -> str:
    return hashlib.sha256(repr(of).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _reference(source: Source, path: Path, folder: Path, tell: Tell) -> Iterator[Path]:
    """A model llama.cpp can run: the GGUF itself, or a temporary Q8_0 of a checkpoint beside the output."""
    if not source.is_checkpoint:
        yield path
        return
    with WorkFolder(folder, label="reference") as work:
        tell(f"writing the checkpoint as {REFERENCE_TYPE}, to run it")
        yield write_stacked(path, work.path / "reference.gguf", REFERENCE_TYPE)
