"""Types tried on some rows, types that time rules out, and types by an importance matrix alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from moe_edge.convert import type_damage
from moe_edge.convert.allocate import allocate_global
from moe_edge.convert.imatrix_damage import weight_errors
from moe_edge.convert.quantize import dequantize, quantize
from moe_edge.convert.quantizing_time import Wanted, allocate_in_time, quantizing_seconds, used_types
from moe_edge.convert.type_damage import expert_errors, expert_output, rows_to_sample, sampled_errors, silu
from moe_edge.models.errors import BadFile, UsageError
from moe_edge.models.formats.ggml_types import find_type
from moe_edge.models.store.store import open_model
from moe_edge.runner.calibrate.forecast import Forecast, clock
from moe_edge.runner.commands.conversion import ConvertRequest, run_convert
from random_models import Shape, write_random_model
from test_imatrix import write_imatrix

Q4, Q8 = find_type("Q4_0").id, find_type("Q8_0").id


def expert(rng: np.random.Generator, n_embd: int = 256, n_ff: int = 512) -> dict[str, np.ndarray]:
    def matrix(rows: int, cols: int) -> np.ndarray:
        values: np.ndarray = (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)
        return values

    return {"up": matrix(n_ff, n_embd), "gate": matrix(n_ff, n_embd), "down": matrix(n_embd, n_ff)}


def there_and_back(weights: np.ndarray, kind: int) -> np.ndarray:
    return dequantize(quantize(weights, kind), kind, weights.shape[1])


def test_errors_from_an_eighth_of_the_rows_are_near_those_from_all() -> None:
    rng = np.random.default_rng(3)
    reference = expert(rng)
    x, g = rng.standard_normal((300, 256)).astype(np.float32), rng.random(300).astype(np.float32)
    rows = {p: np.linspace(0, len(w) - 1, len(w) // 8).round().astype(np.int64) for p, w in reference.items()}
    whole = {p: {k: there_and_back(w, k) for k in (Q4, Q8)} for p, w in reference.items()}
    some = {p: {k: w[rows[p]] for k, w in kinds.items()} for p, kinds in whole.items()}
    together: list[dict[str, int | None]] = [{"up": Q4, "gate": Q4, "down": Q4}, {"up": Q4, "gate": None, "down": Q8}]
    want = expert_errors(x, g, reference, whole, silu, together)
    found = sampled_errors(x, g, reference, rows, some, silu, together)
    assert found.removed == pytest.approx(want.removed, rel=1e-6)
    for p, kinds in want.single.items():
        for kind, error in kinds.items():
            assert found.single[p][kind] == pytest.approx(error, rel=0.15)
    assert found.joint == pytest.approx(want.joint, rel=0.15)


def test_all_rows_of_a_fused_projection_are_the_units_of_both() -> None:
    rng = np.random.default_rng(4)
    plain = expert(rng)
    fused = {"gate_up": np.concatenate([plain["gate"], plain["up"]]), "down": plain["down"]}
    x, g = rng.standard_normal((50, 256)).astype(np.float32), np.ones(50, np.float32)
    units, outputs = np.arange(0, 512, 4), np.arange(0, 256, 4)
    kinds = {p: {Q4: there_and_back(w, Q4)} for p, w in plain.items()}
    both = {"up": Q4, "gate": Q4, "down": Q4}
    want = sampled_errors(
        x, g, plain, {"up": units, "gate": units, "down": outputs},
        {p: {Q4: w[Q4][outputs if p == "down" else units]} for p, w in kinds.items()}, silu, [both],
    ).joint  # fmt: skip
    rows = {"gate_up": np.concatenate([units, units + 512]), "down": outputs}
    mine = {p: {Q4: there_and_back(w, Q4)[rows[p]]} for p, w in fused.items()}
    found = sampled_errors(x, g, fused, rows, mine, silu, [{"gate_up": Q4, "down": Q4}])
    assert found.joint == pytest.approx(want, rel=1e-5)
    assert found.joint[0] == pytest.approx(found.single["gate_up"][Q4] + found.single["down"][Q4], rel=1e-5)


def test_small_matrices_are_taken_whole_and_rows_of_large_ones_are_spread() -> None:
    assert rows_to_sample(256, 256) is None and rows_to_sample(512, 512) is None
    rows = rows_to_sample(768, 2048)
    assert rows is not None and rows[0] == 0 and rows[-1] == 767 and len(set(rows.tolist())) == len(rows)
    assert len(rows) == max(type_damage.LEAST_ROWS, type_damage.SAMPLED_WEIGHTS // 2048)


# ---- time --------------------------------------------------------------------------------------------------


def level(rng: np.random.Generator, budget: int = 250) -> Wanted:
    """100 items; type 1 is a little better than its size and slow, type 3 is worse and larger than type 2."""
    weight = np.exp(rng.standard_normal(100))[:, None]
    return Wanted(
        weight * np.array([8.0, 2.0, 2.5, 2.6, 0.5]), np.tile([1, 2, 2, 3, 4], (100, 1)),
        np.tile([1.0, 50.0, 1.0, 1.0, 1.0], (100, 1)), budget,
    )  # fmt: skip


def test_without_want_of_time_the_choice_is_the_best_one() -> None:
    one = level(np.random.default_rng(1))
    best = allocate_global(one.cost, one.bytes, one.budget_bytes)
    made, priced = allocate_in_time([one], one.seconds_of(best))
    assert not priced and made[0].choice.tolist() == best.choice.tolist()


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_in_less_time_the_slow_type_goes_where_it_matters_most(share: float) -> None:
    one = level(np.random.default_rng(1))
    best = allocate_global(one.cost, one.bytes, one.budget_bytes)
    limit = share * one.seconds_of(best)
    (made,), priced = allocate_in_time([one], limit)
    assert priced and one.seconds_of(made) <= limit and made.bytes <= one.budget_bytes
    assert best.cost < made.cost < 1.3 * best.cost
    slow = made.choice == 1
    assert 0 < slow.sum() < (best.choice == 1).sum()
    weight = one.cost[:, 0]
    assert weight[slow].mean() > weight[made.choice == 2].mean()


def test_a_type_nobody_is_given_is_hopeless() -> None:
    assert 3 not in used_types([level(np.random.default_rng(1))], 1e9)
    assert {0, 1, 4} <= set(used_types([level(np.random.default_rng(1))], 1e9).tolist())


def test_searched_types_are_slower_than_rounded_ones() -> None:
    iq3, q6 = (quantizing_seconds(find_type(name).id, 10**6) for name in ("IQ3_XXS", "Q6_K"))
    assert iq3 > 10 * q6 > 0


def test_a_forecast_goes_by_what_was_measured_once_a_tenth_is_done() -> None:
    now = [0.0]
    forecast = Forecast(lambda: now[0])
    forecast.plan("watching", 20)
    forecast.plan("levels", 10, done=5)
    forecast.know({"watching": 2.0, "levels": 4.0})
    assert forecast.left() == 40 + 20
    now[0] = 6.0
    forecast.step("watching")
    assert forecast.left() == 19 * 2 + 20, "one of twenty says little"
    now[0] = 12.0
    forecast.step("watching")
    assert forecast.left() == 18 * 6 + 20
    again = Forecast(lambda: now[0])
    again.read(forecast.to_json())
    assert again.is_known and again.stages["levels"].each == 4.0
    for damaged in (None, "", "[]", '{"levels": "x"}'):
        torn = Forecast()
        torn.read(damaged)
        assert not torn.is_known
    assert [clock(s) for s in (12, 420, 7500)] == ["12 s", "7 min", "2 h 05 min"]


def test_stages_to_come_are_as_slow_as_those_before_were() -> None:
    """The rehearsal fell into a slow phase of the machine: a calibration of 621 s was forecast at 14 minutes."""
    now = [0.0]
    forecast = Forecast(lambda: now[0])
    forecast.plan("watching", 30)
    forecast.plan("writing", 100)
    forecast.plan("settings", 10)
    forecast.know({"watching": 1.0, "writing": 5.0, "settings": 20.0})
    now[0] += 3.0
    forecast.step("watching", 6)
    assert forecast.left() == pytest.approx(24 * 0.5 + 0.5 * (500 + 200)), "half as long as rehearsed"
    now[0] += 57.0
    forecast.step("watching", 24)
    assert forecast.left() == pytest.approx(2 * (500 + 200))
    now[0] += 40.0
    forecast.step("writing", 20)
    assert forecast.left() == pytest.approx(80 * 2 + 200 * 100 / 130)
    now[0] += 1e6
    forecast.step("writing", 80)
    assert forecast.left() == 200 * 3, "a pause is no pace"


def test_what_came_before_the_forecast_sets_no_pace() -> None:
    """Loading and the first reads took 40 s for two chunks of 12: a calibration of 74 minutes was forecast at 127."""
    now = [0.0]
    forecast = Forecast(lambda: now[0])
    forecast.plan("watching", 32)
    forecast.plan("writing", 100)
    now[0] += 40.0
    forecast.step("watching", 2)
    forecast.know({"watching": 12.0, "writing": 10.0})
    assert forecast.left() == 30 * 12 + 1000
    now[0] += 12.0
    forecast.step("watching")
    assert forecast.left() == pytest.approx(29 * 12 + 1000)


# ---- an importance matrix alone ----------------------------------------------------------------------------


def test_errors_by_mean_squares_are_near_those_by_tokens() -> None:
    """Inputs without correlations: what the matrix knows of them is all there is to know."""
    rng = np.random.default_rng(5)
    reference = expert(rng)
    x = rng.standard_normal((2000, 256)).astype(np.float32)
    hidden = type_damage.expert_hidden(x, reference, silu)
    seen = type_damage.column_importance(x, hidden)
    tried = {p: {k: there_and_back(w, k) for k in (Q4, Q8)} for p, w in reference.items()}
    rows = {p: np.arange(len(w)) for p, w in reference.items()}
    found, energy = weight_errors(reference, rows, tried, {p: seen.of(p) for p in reference})
    want = expert_errors(x, np.ones(2000, np.float32), reference, tried, silu)
    assert energy == pytest.approx(np.square(expert_output(x, reference, silu)).sum() / 2000, rel=0.3)
    for p in reference:
        for kind in (Q4, Q8):
            assert found[p][kind] == pytest.approx(want.single[p][kind] / 2000, rel=0.5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(n_layer=2, n_expert=8, n_used=2)
    return write_random_model(tmp_path_factory.mktemp("source") / "m.gguf", "qwen3moe", shape, expert_type="F16")


def matrix(path: Path, layers: int = 2) -> Path:
    rng = np.random.default_rng(1)
    counts = np.array([[100.0], [1], [1], [1], [1], [1], [1], [0]], np.float32)
    sums = {
        f"blk.{layer}.ffn_{p}_exps.weight": (rng.random((8, 256)).astype(np.float32) * counts, counts)
        for layer in range(layers) for p in ("up", "gate", "down")
    }  # fmt: skip
    return write_imatrix(path, sums)


def test_bits_by_an_importance_matrix_need_no_text_and_favour_what_is_used(source: Path, tmp_path: Path) -> None:
    request = ConvertRequest(
        source, tmp_path / "c.gguf", bits=5.25, low_bits=4.75, types="Q4_0,Q5_0,Q8_0", allocate="imatrix",
        imatrix=matrix(tmp_path / "i.gguf"), n_threads=1,
    )  # fmt: skip
    report = run_convert(request)
    model = open_model(tmp_path / "c.gguf", verify=True)
    assert 5.2 < report.plan.bits_per_weight("high") <= 5.25 and 4.7 < report.plan.bits_per_weight("low") <= 4.75
    assert model.calibration is None and model.levels == ("high", "low")
    high = {e.name: e.nbytes for e in report.plan.experts if ".low." not in e.name}
    sizes = [sum(n for name, n in high.items() if f"_exps.{number}." in name) for number in range(8)]
    assert sizes[0] == max(sizes) > min(sizes)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"imatrix": None}, "needs an importance matrix"),
        ({"bits": None}, "give one of them"),
        ({"calibrate": Path("t.txt")}, "does not run the model"),
        ({"bits": 4.0}, "need at least 4.5 bits a weight"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    source: Path, tmp_path: Path, changed: dict[str, object], says: str
) -> None:
    asked = {"bits": 5.0, "types": "Q4_0,Q8_0", "imatrix": matrix(tmp_path / "i.gguf"), "allocate": "imatrix"}
    asked |= changed
    if asked["bits"] is None:
        asked["types"] = None
    with pytest.raises(UsageError, match=says):
        run_convert(ConvertRequest(source, tmp_path / "c.gguf", **asked))  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["i.gguf"]


def test_a_matrix_without_a_layer_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    request = ConvertRequest(
        source, tmp_path / "c.gguf", bits=5.0, types="Q4_0,Q8_0", allocate="imatrix",
        imatrix=matrix(tmp_path / "i.gguf", layers=1),
    )  # fmt: skip
    with pytest.raises(BadFile, match="nothing of the experts' up in layer 1"):
        run_convert(request)


def test_without_a_text_or_a_matrix_the_sentence_names_both(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--calibrate TEXT; or --allocate imatrix --imatrix FILE"):
        run_convert(ConvertRequest(source, tmp_path / "c.gguf", bits=5.0))
