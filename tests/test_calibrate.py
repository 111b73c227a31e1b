"""`convert --calibrate` on tiny random models: what is measured and what is chosen by it; failures leave nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from moe_edge.convert import allocate as rules
from moe_edge.convert.conversion_plan import ExpertTypes
from moe_edge.convert.convert import ConvertReport
from moe_edge.convert.quantize import dequantize, quantize
from moe_edge.models.calibration import GATES_NORMALISED, Calibration
from moe_edge.models.errors import MoeEdgeError, UnknownName, UsageError
from moe_edge.models.formats.ggml_types import find_type, tensor_bytes
from moe_edge.models.store.store import expert_name, open_model
from moe_edge.runner.calibrate import choose_types as choices_module
from moe_edge.runner.calibrate import expert_weights as experts_module
from moe_edge.runner.calibrate import measured_settings as settings_module
from moe_edge.runner.calibrate import summary as summary_module
from moe_edge.runner.calibrate.calibrate import CalibrateOptions, Calibrator, convert_calibrated
from moe_edge.runner.calibrate.observe import LayerView, measure_sensitivity, spread_chunks
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.measure.evaluate import eval_options
from moe_edge.runner.measure.logits import cut_chunks, kld_of_rows, logits_pass, tokenize_text
from moe_edge.runner.sizes import NO_LIMIT
from moe_edge.schedulers.layout import SKIP, Layout, Step, StepPlan
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies.damage import PRICE
from random_models import Shape, write_random_model
from test_calibration import make_calibration
from test_imatrix import write_imatrix

ROOT = Path(__file__).parent.parent
TYPES = ("Q4_0", "Q5_0", "Q8_0")  # K-quants take seconds
BITS = 5.25
N_USED, N_EXPERT, N_LAYER, N_TOKENS = 2, 8, 2, 1024


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose and tables, some 15,000 tokens of the random models' vocabulary."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"".join((ROOT / name).read_bytes() for name in ("README.md", "docs/FORMAT.md", "docs/LOG.md")))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(n_layer=N_LAYER, n_expert=N_EXPERT, n_used=N_USED)
    return write_random_model(tmp_path_factory.mktemp("source") / "m.gguf", "qwen3moe", shape, expert_type="F16")


def options(text: Path, **changes: object) -> CalibrateOptions:
    o: dict[str, object] = {
        "types": TYPES, "n_tokens": N_TOKENS, "sensitivity_tokens": 512, "settings_tokens": 0, "n_threads": 1,
    }  # fmt: skip
    return CalibrateOptions(text, **(o | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def measured(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calibrator]:
    """The source on the text, with everything that was seen still at hand."""
    with Calibrator(source, tmp_path_factory.mktemp("work"), options(text, settings_tokens=512)) as calibrator:
        yield calibrator


@pytest.fixture(scope="module")
def report(measured: Calibrator, tmp_path_factory: pytest.TempPathFactory) -> ConvertReport:
    """Converted to BITS, with a low level and the table of settings."""
    types = ExpertTypes(low="Q4_0", homes=measured.allocate(BITS))
    return measured.convert(tmp_path_factory.mktemp("out") / "c.gguf", types)


@pytest.fixture(scope="module")
def calibration(report: ConvertReport) -> Calibration:
    assert report.skeleton is not None
    found = open_model(report.skeleton).calibration
    assert found is not None
    return found


# ---- what is measured --------------------------------------------------------------------------------------


def test_every_token_is_counted_in_every_layer(calibration: Calibration, measured: Calibrator) -> None:
    c = calibration
    assert c.n_tokens == N_TOKENS and c.levels == ("high", "low") and len(c.text_sha256) == 64
    assert c.counts.shape == c.mean_gate.shape == c.squares.shape == (N_LAYER, N_EXPERT)
    assert c.counts.sum(1).tolist() == [N_TOKENS * N_USED] * N_LAYER
    assert c.error.shape == (N_LAYER, N_EXPERT, 3) and c.sensitivity.shape == (N_LAYER,)
    assert c.cumulated.shape == (101,) and c.use_damage.shape == (N_LAYER, 101)
    # this architecture's gate weights sum to 1 for each token
    assert (c.counts * c.mean_gate).sum(1) == pytest.approx([N_TOKENS] * N_LAYER, rel=1e-4)
    assert (c.squares <= c.counts * c.mean_gate + 1e-6).all()
    for view in measured.seen.layers:
        assert view.inputs.shape == (N_TOKENS, 256) and view.experts.shape == (N_TOKENS, N_USED)


def test_what_is_measured_of_uses_rises_from_nothing(calibration: Calibration) -> None:
    """The heaviest expert of a token has nothing before it: of two, half of the shares are 0."""
    s = calibration.cumulated
    assert (s[:50] == 0).all() and (s[51:] >= 0.5 - 1e-6).all() and s[100] < 1 and (np.diff(s) >= 0).all()
    assert (np.diff(calibration.use_damage, axis=1) >= 0).all() and (calibration.use_damage[:, 0] >= 0).all()


def test_a_higher_level_errs_less_and_removal_most(calibration: Calibration) -> None:
    high, low, removed = np.moveaxis(calibration.error, -1, 0)
    used = calibration.counts > 0
    assert used.all() and (high > 0).all() and (high <= low * 1.001).all() and (low < removed / 10).all()
    assert (high < low * 0.9).any() and (calibration.damage() >= 0).all()


def test_an_error_is_that_of_the_weights_in_the_store(
    calibration: Calibration, measured: Calibrator, report: ConvertReport
) -> None:
    """One expert by hand: sum of g^2 |E(x) - E_level(x)|^2 over its tokens, from the bytes on disk."""
    assert report.skeleton is not None
    where, expert = 1, 3
    x, g = measured.seen.layers[where].rows_of(expert)
    assert 0 < len(g) <= experts_module.MOST_ROWS
    reference = output(x, weights_of(report.skeleton, measured, where, expert, None))
    want = [
        np.square(
            g[:, None] * (reference - output(x, weights_of(report.skeleton, measured, where, expert, level)))
        ).sum()
        for level in ("high", "low")
    ] + [np.square(g[:, None] * reference).sum()]
    assert calibration.error[where, expert] == pytest.approx(want, rel=1e-3)


def weights_of(
    skeleton: Path, measured: Calibrator, where: int, expert: int, level: str | None
) -> dict[str, np.ndarray]:
    """projection -> float64 weights at a level of the store; None: of the source."""
    model, layer, found = open_model(skeleton), measured.source.layers[where], {}
    by_name = {p.name: p for p in model.pieces}
    for projection in layer.projections:
        if level is None:
            entry = measured.source.experts[layer.layer, expert, projection]
            path, at, nbytes, kind, cols = entry.path, entry.offset, entry.nbytes, entry.type, entry.shape[0]
        else:
            p = by_name[expert_name(layer.layer, projection, expert, level)]
            path, at, nbytes, kind, cols = model.files[p.file], p.offset, p.nbytes, p.type, p.cols
        found[projection] = dequantize(path.read_bytes()[at : at + nbytes], kind, cols).astype(np.float64)
    return found


def output(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    gate = x @ w["gate"].T
    return ((gate / (1 + np.exp(-gate))) * (x @ w["up"].T)) @ w["down"].T  # type: ignore[no-any-return]


def test_more_noise_makes_more_divergence_and_the_layers_weight_is_their_ratio(source: Path, text: Path) -> None:
    o = eval_options(source, EngineOptions(n_threads=1), 512)
    with Engine(source, o) as engine:
        chunks = cut_chunks(tokenize_text(engine, text.read_bytes()), 512, n_chunks=1)
        exact = np.concatenate([b.rows.copy() for b in logits_pass(engine, chunks)])
        kld, energy = [], []
        for noise in (0.05, 0.2, 0.8):
            engine.native.set_noise(0, noise, 1)
            rows = np.concatenate([b.rows.copy() for b in logits_pass(engine, chunks)])
            energy.append(engine.native.set_noise(-1, 0.0, 1))
            kld.append(kld_of_rows(exact, rows).mean())
        engine.native.set_noise(N_LAYER - 1, 0.2, 1)
        rows = np.concatenate([b.rows.copy() for b in logits_pass(engine, chunks)])
        last, last_energy = kld_of_rows(exact, rows).mean(), engine.native.set_noise(-1, 0.0, 1)
        sensitivity = measure_sensitivity(engine, chunks, 0.2)
        again = np.concatenate([b.rows.copy() for b in logits_pass(engine, chunks)])
    assert 0 < kld[0] < kld[1] < kld[2]
    assert np.divide(energy[1:], energy[:2]) == pytest.approx([16, 16], rel=0.1)  # the square of the noise
    assert (sensitivity > 0).all() and sensitivity[0] == pytest.approx(kld[1] * 512 / energy[1], rel=1e-6)
    # of the last layer llama.cpp computes the scored positions alone
    assert sensitivity[-1] == pytest.approx(last * len(exact) / last_energy, rel=1e-6)
    assert np.array_equal(exact, again), "nothing of the noise is left"


def test_chunks_are_spread_over_the_text() -> None:
    chunks = np.arange(10, dtype=np.int32)[:, None] * np.ones(512, np.int32)
    assert spread_chunks(chunks, 2048)[:, 0].tolist() == [0, 3, 6, 9]
    assert spread_chunks(chunks, 10**6)[:, 0].tolist() == list(range(10))
    assert spread_chunks(chunks, 1)[:, 0].tolist() == [0]


# ---- what is chosen ----------------------------------------------------------------------------------------


def test_the_bits_asked_for_are_kept_and_used(report: ConvertReport, measured: Calibrator) -> None:
    plan = report.plan
    assert BITS - 0.05 < plan.bits_per_weight("high") <= BITS and plan.bits_per_weight("low") == 4.5
    assert set(measured.allocate(BITS).values()) <= {find_type(name).id for name in TYPES}
    assert sum(measured.allocate(8.5).values()) == len(measured.source.experts) * find_type("Q8_0").id
    assert sum(measured.allocate(4.5).values()) == len(measured.source.experts) * find_type("Q4_0").id


def test_global_allocation_costs_less_than_the_others_at_the_same_bits(measured: Calibrator) -> None:
    def predicted(how: str) -> float:
        homes = measured.allocate(BITS, how)
        size = {key: tensor_bytes(kind, measured.source.experts[key].shape) for key, kind in homes.items()}
        weights = sum(np.prod(measured.source.experts[key].shape) for key in homes)
        assert 8 * sum(size.values()) / weights <= BITS
        number = {layer.layer: i for i, layer in enumerate(measured.source.layers)}
        return sum(  # type: ignore[no-any-return]
            measured.errors()[layer, e].single[p][kind] * measured.seen.sensitivity[number[layer]]
            for (layer, e, p), kind in homes.items()
        )

    damage = {how: predicted(how) for how in ("global", "layer", "frequency", "uniform")}
    assert damage["global"] == min(damage.values()) and damage["global"] < 0.9 * damage["uniform"]


def test_errors_of_types_fall_with_their_bits(measured: Calibrator) -> None:
    q4, q5, q8 = (find_type(name).id for name in TYPES)
    for each in measured.errors().values():
        for single in each.single.values():
            assert single[q4] > single[q5] > single[q8] > 0


def test_the_measured_importance_reaches_the_quantizer(measured: Calibrator, report: ConvertReport) -> None:
    """gate and up are weighed by the mean square of their inputs, with g^2; the bytes are those with it."""
    view, key = measured.seen.layers[0], (0, 2, "up")
    x, g = view.rows_of(2)
    want = (np.square(g)[:, None] * np.square(x)).sum(0) / np.square(g).sum()
    assert measured.importance[key] == pytest.approx(want, rel=1e-4)
    assert measured.importance[0, 2, "gate"] is not None and measured.importance[0, 2, "down"].shape == (256,)
    assert report.skeleton is not None
    model = open_model(report.skeleton)
    (piece,) = [p for p in model.pieces if p.name == expert_name(0, "up", 2, "low")]
    rows = weights_of(report.skeleton, measured, 0, 2, None)["up"].astype(np.float32)
    found = model.files[piece.file].read_bytes()[piece.offset : piece.offset + piece.nbytes]
    assert found == quantize(rows, piece.type, measured.importance[key])
    assert found != quantize(rows, piece.type, None)


def test_what_a_replacement_costs_is_measured_and_policy_damage_trades_by_it(
    calibration: Calibration, report: ConvertReport
) -> None:
    measured = calibration.substitution
    assert measured is not None and set(measured.gates.tolist()) == {GATES_NORMALISED}
    assert (measured.factor > 0).all()
    assert report.skeleton is not None
    counts = []
    for substitute in ("off", "auto"):
        policy = PolicyOptions("damage", price=100.0, substitute=substitute)
        o = EngineOptions(n_ctx=256, n_threads=1, policy=policy)
        with Engine(report.skeleton, replace(o, ram_bytes=_half(report.skeleton, o))) as engine:
            tokens = tokenize_text(engine, b"Where the disk is slow, fewer bytes are read.")[:40]
            with engine.decoding():
                engine.llama.eval([int(t) for t in tokens])
                for token in tokens[:20]:
                    engine.llama.eval([int(token)])
            counts.append(engine.counters())
            assert engine.policy.stats.substituted == counts[-1].substituted_uses
            assert (engine.policy.stats.expected_damage or 0.0) > 0
    assert counts[0].substituted_uses == 0 < counts[1].substituted_uses
    assert counts[1].committed_bytes <= counts[1].peak_committed_bytes


def _half(model: Path, options: EngineOptions) -> int:
    """A --ram with room for half of the experts."""
    probe = Engine(model, replace(options, ram_bytes=NO_LIMIT))
    probe.close()
    return probe.plan.fixed.total_bytes + probe.layout.total_bytes // 2


def test_the_table_of_settings_is_sorted_and_the_store_still_whole(
    report: ConvertReport, calibration: Calibration
) -> None:
    assert report.skeleton is not None
    model = open_model(report.skeleton, verify=True)
    assert model.store_id == report.store_id
    rows = calibration.settings
    assert [s.bytes_share for s in rows] == sorted(s.bytes_share for s in rows) and 6 <= len(rows) <= 16
    assert {(s.policy, s.low_level) for s in rows} == {("dymoe", "low"), ("dymoe", "skip"), ("damage", "low")}
    assert all(0 < s.bytes_share <= 1 and s.kld >= 0 for s in rows)
    skip = {round(s.knob, 3): s for s in rows if s.low_level == "skip"}
    assert skip[0.75].bytes_share < skip[0.9].bytes_share and skip[0.75].kld > skip[0.9].kld > 0
    low = {round(s.knob, 3): s for s in rows if (s.policy, s.low_level) == ("dymoe", "low")}
    assert low[0.5].bytes_share < low[0.9].bytes_share and low[0.5].kld >= low[0.9].kld
    # no low copy is smaller than 4.5 bits of an average 5.25
    assert min(s.bytes_share for s in low.values()) > 4.5 / 5.5


def test_bytes_are_those_of_each_experts_own_levels() -> None:
    """Expert 0 takes 80 or 50, expert 1 takes 50 at both: lowering the second saves nothing."""
    plans = iter([StepPlan([0, 1], [0, 1], [(), ()]), StepPlan([1, 0], [SKIP, 1], [(), ()]), None])

    class Policy:
        def plan(self, _: Step) -> StepPlan | None:
            return next(plans)

    used = settings_module._BytesUsed(Layout((2,), 2, (80, 50, 50, 50)), Policy())  # type: ignore[arg-type]
    seen = []
    for _ in range(3):
        used.plan(Step(0, [0, 1], [1, 1]))
        seen.append((used.bytes, used.exact_bytes))
    assert seen == [(130, 130), (130 + 50, 260), (180 + 130, 390)]


def test_a_low_level_that_saves_nothing_has_no_price() -> None:
    made = make_calibration()
    assert all(o.name == "dymoe" for o in settings_module._grid(made, 1e6, 1e6))
    assert all(o.name == "dymoe" for o in settings_module._grid(made, 1e6, 2e6))
    priced = [o for o in settings_module._grid(made, 2e6, 1e6) if o.name == "damage"]
    assert len(priced) == 6 and all(o[PRICE] > 0 for o in priced)
    assert len(settings_module._grid(made, 2e6, 1e6)) <= 16
    harmless = replace(made, use_damage=0 * made.use_damage)
    assert all(o.name == "dymoe" for o in settings_module._grid(harmless, 2e6, 1e6))


def test_quantiles_by_hand() -> None:
    """Weights 3 and 1: the shares before them are 0 and 0.75."""
    view = LayerView(np.zeros((1, 4), np.float16), np.array([[0, 1]], np.int32), np.array([[1, 3]], np.float32))
    quantiles = summary_module.cumulated_quantiles([view])
    assert (quantiles[0], quantiles[50], quantiles[100]) == (0.0, pytest.approx(0.375), pytest.approx(0.75))


def test_many_tokens_are_thinned_and_the_sums_scaled() -> None:
    n = 4 * experts_module.MOST_ROWS
    g = np.linspace(0.1, 1, n).astype(np.float32)
    view = LayerView(np.zeros((n, 4), np.float16), np.zeros((n, 1), np.int32), g[:, None])
    x, kept, scale = experts_module.some_rows(view, 0)
    assert len(x) == len(kept) == experts_module.MOST_ROWS
    assert np.square(kept).sum() * scale == pytest.approx(np.square(g).sum(), rel=1e-5)


# ---- other sources -----------------------------------------------------------------------------------------


def test_a_checkpoint_is_run_as_a_temporary_file_that_goes(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out, temp = write_checkpoint(tmp_path / "hf"), tmp_path / "out", tmp_path / "temp"
    out.mkdir()
    temp.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temp))
    seen: list[str] = []

    def tell(line: str) -> None:
        seen.extend(p.name for p in out.iterdir() if p.is_dir())

    made = convert_calibrated(checkpoint, out / "c.gguf", ExpertTypes("Q4_0"), options(text, n_tokens=512), tell=tell)
    assert any(name.startswith(".moe-edge-reference-") for name in seen)
    assert sorted(p.name for p in out.iterdir()) == ["c.experts.gguf", "c.gguf"] and not list(temp.iterdir())
    found = open_model(out / "c.gguf").calibration
    assert found is not None and found.counts.sum(1).tolist() == [512 * 2] * 2
    assert found.levels == ("high",) and found.settings == () and made.plan.bits_per_weight("high") == 4.5


def test_an_importance_matrix_is_used_in_place_of_our_own(source: Path, text: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sums = {
        f"blk.{layer}.ffn_{p}_exps.weight": (rng.random((N_EXPERT, 256)).astype(np.float32), [[1]] * N_EXPERT)
        for layer in range(N_LAYER)
        for p in ("up", "gate", "down")
    }
    path = write_imatrix(tmp_path / "i.gguf", sums)
    o = options(text, imatrix=path, n_tokens=512)
    told: list[str] = []
    made = convert_calibrated(source, tmp_path / "c.gguf", ExpertTypes("Q4_0"), o, tell=told.append)
    assert not any("importance" in line for line in told)
    model = open_model(tmp_path / "c.gguf")
    assert made.skeleton is not None and model.calibration is not None
    (piece,) = [p for p in model.pieces if p.name == expert_name(1, "down", 4, "high")]
    found = model.files[piece.file].read_bytes()[piece.offset : piece.offset + piece.nbytes]
    from moe_edge.convert.checkpoints import open_source

    entry = open_source(source).experts[1, 4, "down"]
    rows = dequantize(source.read_bytes()[entry.offset : entry.offset + entry.nbytes], entry.type, 256)
    assert found == quantize(rows, piece.type, sums["blk.1.ffn_down_exps.weight"][0][4])


# ---- failures leave nothing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "stage", "error"),
    [
        ("observe", "sensitivity", MoeEdgeError("failed")),
        ("errors", "errors", KeyboardInterrupt()),
        ("levels", "levels", MoeEdgeError("failed")),
        ("settings", "setting:", KeyboardInterrupt()),
    ],
)
def test_a_stop_at_any_stage_leaves_what_was_found_and_the_same_call_goes_on(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, stage: str,
    error: BaseException,
) -> None:  # fmt: skip
    out, temp = tmp_path / "out", tmp_path / "temp"
    out.mkdir()
    temp.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temp))

    def tell(line: str) -> None:
        if line.startswith(stage):
            raise error

    o = options(text, n_tokens=512, types=("Q4_0", "Q5_0"), settings_tokens=512 if where == "settings" else 0)
    bits = 4.75 if where == "errors" else None
    types = ExpertTypes(None if bits else "Q4_0")
    with pytest.raises(type(error)):
        convert_calibrated(source, out / "c.gguf", types, o, bits=bits, tell=tell)
    assert [p.name for p in out.iterdir()] == ["c.gguf.moe-edge-calibrate"] and not list(temp.iterdir())
    told: list[str] = []
    convert_calibrated(source, out / "c.gguf", types, o, bits=bits, tell=told.append)
    assert sorted(p.name for p in out.iterdir()) == ["c.experts.gguf", "c.gguf"] and not list(temp.iterdir())
    assert not any(line.startswith("watching") for line in told), "that was done before"


@pytest.mark.parametrize(("bits", "says"), [(4.4, r"--bits 4.4: .*Q4_0, Q5_0, Q8_0 need at least 4.5 bits a weight")])
def test_bits_that_cannot_be_made_are_refused_before_anything_runs(
    source: Path, text: Path, tmp_path: Path, bits: float, says: str
) -> None:
    told: list[str] = []
    with pytest.raises(UsageError, match=says):
        convert_calibrated(source, tmp_path / "c.gguf", ExpertTypes(), options(text), bits=bits, tell=told.append)
    assert not told and not list(tmp_path.iterdir())


def test_a_text_of_less_than_a_chunk_is_refused(source: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("The king said. " * 20)
    with pytest.raises(UsageError, match=r"the text has \d+ tokens but one chunk needs 512"):
        convert_calibrated(source, tmp_path / "c.gguf", ExpertTypes("Q4_0"), options(short))
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


def test_an_architecture_with_other_experts_is_refused_by_name(
    random_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnknownName, match=r"does not know the experts of 'gpt-oss'.*convert without --calibrate"):
        convert_calibrated(random_model("gpt-oss"), tmp_path / "c.gguf", ExpertTypes("Q4_0"), options(text))
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_refused_before_anything_runs(source: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "c.gguf").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        convert_calibrated(source, tmp_path / "c.gguf", ExpertTypes("Q4_0"), options(text))
    assert (tmp_path / "c.gguf").read_text() == "mine"


def test_unknown_types_are_refused(source: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="Q9_Z"):
        convert_calibrated(source, tmp_path / "c.gguf", ExpertTypes(), options(text, types=("Q9_Z",)), bits=4.0)
    assert not list(tmp_path.iterdir())


def test_the_methods_to_compare_with_are_the_allocations() -> None:
    nothing, once = np.zeros(4, np.int64), np.ones(4, np.int64)
    made = choices_module.allocations(np.ones((4, 2)), np.array([[1, 2]] * 4), 6, nothing, once)
    assert {name: how().bytes <= 6 for name, how in made.items()} == dict.fromkeys(
        ("global", "layer", "frequency", "uniform"), True
    )
    assert isinstance(made["global"](), rules.Allocation)
