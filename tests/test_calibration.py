"""Calibrations in the store: exact both ways, settings patched in place; and the damage they are made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import N_EXPERT, N_LAYER, floats
from moe_edge.convert.convert import convert
from moe_edge.convert.quantize import dequantize, quantize
from moe_edge.convert.type_damage import (
    ACTIVATIONS,
    REFUSED,
    column_importance,
    expert_errors,
    expert_hidden,
    expert_output,
    find_activation,
    gelu,
    relu,
    relu_squared,
    silu,
)
from moe_edge.models.calibration import Calibration, Setting
from moe_edge.models.errors import BadFile, MoeEdgeError, UnknownName, UsageError
from moe_edge.models.families import ARCHITECTURES
from moe_edge.models.formats.gguf import read_gguf
from moe_edge.models.formats.keyvalues import parse_records
from moe_edge.models.store.calibration_keys import (
    LOW_LEVELS,
    POLICIES,
    SETTING_ROWS,
    calibration_kvs,
    patch_settings,
    read_calibration,
)
from moe_edge.models.store.store import open_model
from moe_edge.schedulers.options import LOW_LEVEL
from moe_edge.schedulers.policies import POLICY_NAMES

FIELDS = ("counts", "mean_gate", "squares", "sensitivity", "error", "cumulated", "use_damage")
LEVELS = b"calibration.levels\x09\0\0\0\x08\0\0\0\x02\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0"
ROWS = (Setting("dymoe", "skip", 0.75, 0.125, 0.5), Setting("hobbit", "low", 0.5, 2.0**-10, 0.25))


def make_calibration(n_layers: int = N_LAYER, n_experts: int = N_EXPERT, n_levels: int = 2) -> Calibration:
    """Random numbers that f32 holds exactly."""

    def numbers(*shape: int) -> np.ndarray:
        return np.abs(floats(*shape)).astype(np.float64)  # type: ignore[no-any-return]

    return Calibration(
        text_sha256="ab" * 32,
        n_tokens=4096,
        levels=("high", "low")[:n_levels],
        counts=np.arange(n_layers * n_experts).reshape(n_layers, n_experts) * 10**6,
        mean_gate=numbers(n_layers, n_experts),
        squares=numbers(n_layers, n_experts),
        sensitivity=numbers(n_layers),
        error=numbers(n_layers, n_experts, n_levels + 1),
        cumulated=numbers(101),
        use_damage=numbers(n_layers, 101),
        settings=ROWS,
    )


def assert_same(found: Calibration | None, needed: Calibration) -> None:
    assert found is not None
    for name in FIELDS:
        ours, theirs = getattr(found, name), getattr(needed, name)
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), name
    for name in ("text_sha256", "n_tokens", "levels", "settings"):
        assert getattr(found, name) == getattr(needed, name), name


@pytest.fixture
def calibrated(stock: Path, tmp_path: Path) -> Path:
    convert(stock, tmp_path / "m.gguf", "Q4_K", low_type="Q2_K", calibration=make_calibration())
    return tmp_path / "m.gguf"


def test_calibration_is_exact_both_ways() -> None:
    needed = make_calibration()
    kv = parse_records(calibration_kvs(needed).values())
    assert_same(read_calibration(kv), needed)
    assert read_calibration(parse_records([])) is None
    third = replace(needed, mean_gate=needed.mean_gate / 3)
    found = read_calibration(parse_records(calibration_kvs(third).values()))
    assert found is not None and np.array_equal(found.mean_gate, third.mean_gate.astype(np.float32))


def test_store_carries_the_calibration_and_its_id_does_not(stock: Path, tmp_path: Path, calibrated: Path) -> None:
    needed = make_calibration()
    convert(stock, tmp_path / "n.gguf", "Q4_K", low_type="Q2_K", calibration=needed)
    plain = convert(stock, tmp_path / "plain.gguf", "Q4_K", low_type="Q2_K")
    with_one, without = open_model(tmp_path / "n.gguf", verify=True), open_model(tmp_path / "plain.gguf")
    assert_same(with_one.calibration, needed)
    assert without.calibration is None and with_one.store_id == plain.store_id
    assert open_model(stock, tmp_path / "cache").calibration is None
    assert "moe_edge.calibration.error" in gguf.GGUFReader(tmp_path / "n.experts.gguf").fields


def test_settings_are_patched_without_changing_anything_else(calibrated: Path) -> None:
    store = calibrated.with_name("m.experts.gguf")
    before, header = open_model(calibrated), read_gguf(store)
    old = store.read_bytes()
    rows = tuple(Setting("exact", "", 1.0, 0.0, number / 16) for number in range(SETTING_ROWS))
    for settings in (rows, (), ROWS[:1]):
        patch_settings(store, settings)
        after = open_model(calibrated, verify=True)
        assert after == before and after.calibration is not None and before.calibration is not None
        assert_same(after.calibration, replace(before.calibration, settings=settings))
    assert read_gguf(store).tensors == header.tensors and read_gguf(store).kv.keys() == header.kv.keys()
    patch_settings(store, ROWS)
    assert store.read_bytes() == old


def test_settings_that_do_not_fit_are_refused(calibrated: Path, stock: Path, tmp_path: Path) -> None:
    store = calibrated.with_name("m.experts.gguf")
    old = store.read_bytes()
    with pytest.raises(UsageError, match="17 settings do not fit the 16 rows"):
        patch_settings(store, ROWS[:1] * 17)
    with pytest.raises(UsageError, match="cannot store the setting 'lru' with low level 'low'"):
        patch_settings(store, [Setting("lru", "low", 1.0, 0.0, 1.0)])
    with pytest.raises(UsageError, match=r"settings\.kld holds numbers that are not finite"):
        patch_settings(store, [Setting("exact", "low", 1.0, np.nan, 1.0)])
    assert store.read_bytes() == old
    convert(stock, tmp_path / "plain.gguf")
    with pytest.raises(UsageError, match="has no calibration to put settings into"):
        patch_settings(tmp_path / "plain.experts.gguf", ROWS)


def test_every_policy_and_low_level_has_a_number() -> None:
    assert set(POLICY_NAMES) <= set(POLICIES) and set(LOW_LEVEL.choices) <= set(LOW_LEVELS)
    assert POLICIES[:3] == ("exact", "dymoe", "hobbit") and LOW_LEVELS[:3] == ("low", "skip", "")  # in files for ever


def test_calibration_of_another_model_is_refused(stock: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is of the levels \['high', 'low'\], the conversion makes \['high'\]"):
        convert(stock, tmp_path / "m.gguf", calibration=make_calibration())
    with pytest.raises(UsageError, match=r"calibration is of \[3, 4\] layers and experts, the model has \[2, 4\]"):
        convert(stock, tmp_path / "m.gguf", calibration=make_calibration(3, n_levels=1))
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match=r"error has shape \[2, 4\], expected \[2, 4, 3\]"):
        calibration_kvs(replace(make_calibration(), error=np.zeros((2, 4))))
    with pytest.raises(UsageError, match="mean_gate holds numbers that are not finite"):
        calibration_kvs(replace(make_calibration(), mean_gate=np.full((2, 4), np.inf)))
    with pytest.raises(UsageError, match="counts are -1 to 0, expected 0"):
        calibration_kvs(replace(make_calibration(), counts=-np.eye(2, 4, dtype=np.int64)))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b"calibration.version\x04\0\0\0\1", b"calibration.version\x04\0\0\0\2", "calibration has version 2"),
        (b"calibration.n_layers\x04\0\0\0\2", b"calibration.n_layers\x04\0\0\0\3", "expected 12"),
        (b"calibration.squares", b"calibration.squarez", "squares is missing or has another type"),
        (b"calibration.counts\x09\0\0\0\4", b"calibration.counts\x09\0\0\0\6", "counts is missing or has another type"),
        (b"calibration.n_tokens\x04", b"calibration.n_tokens\x06", "n_tokens is"),
        (LEVELS + b"high", LEVELS + b"hugh", "at the levels ['hugh', 'low'], expected [2, 4] at ['high', 'low']"),
        (b"settings.count\x04\0\0\0\2", b"settings.count\x04\0\0\0\x11", "settings.policy holds"),
    ],
)
def test_damaged_calibration_is_refused(calibrated: Path, old: bytes, new: bytes, says: str) -> None:
    store = calibrated.with_name("m.experts.gguf")
    data = store.read_bytes()
    assert data.count(old) == 1
    store.write_bytes(data.replace(old, new))
    with pytest.raises(BadFile) as caught:
        open_model(calibrated)
    assert says in str(caught.value) and "m.experts.gguf" in str(caught.value)


def test_flipped_calibration_never_escapes_our_errors(calibrated: Path) -> None:
    store = calibrated.with_name("m.experts.gguf")
    data = store.read_bytes()
    start = data.index(b"moe_edge.calibration.version")
    end = data.index(b"moe_edge.calibration.settings.bytes_share") + 120
    refused = 0
    for at in range(start, end, 7):
        with open(store, "r+b") as file:
            file.seek(at)
            file.write(bytes([data[at] ^ 0x81]))
        try:
            open_model(calibrated)
        except MoeEdgeError:
            refused += 1
        with open(store, "r+b") as file:
            file.seek(at)
            file.write(data[at : at + 1])
    assert refused > 0.3 * len(range(start, end, 7))  # the rest are other numbers, which a calibration may hold


# An expert worked by hand: 2 inputs, 2 hidden columns, relu in the place of silu so that the numbers stay whole.
X = np.array([[1, 2], [3, -1]], np.float32)
G = np.array([1.0, 0.5], np.float32)
EXPERT = {
    "up": np.array([[1, 0], [0, 1]], np.float32),
    "gate": np.array([[1, 1], [1, -1]], np.float32),
    "down": np.array([[1, 0], [2, 1]], np.float32),
}  # h = relu([3, -1]) * [1, 2] = [3, 0] and relu([2, 4]) * [3, -1] = [6, -4]; E = [3, 6] and [6, 8]


def test_expert_worked_by_hand() -> None:
    assert expert_hidden(X, EXPERT, relu).tolist() == [[3, 0], [6, -4]]
    assert expert_output(X, EXPERT, relu).tolist() == [[3, 6], [6, 8]]
    fused = {"gate_up": np.concatenate([EXPERT["gate"], EXPERT["up"]]), "down": EXPERT["down"]}
    assert expert_output(X, fused, relu).tolist() == [[3, 6], [6, 8]]
    plain = {"up": EXPERT["gate"], "down": EXPERT["down"]}
    assert expert_hidden(X, plain, relu_squared).tolist() == [[9, 0], [4, 16]]


def test_errors_worked_by_hand() -> None:
    up = np.array([[2, 0], [0, 1]], np.float32)  # h changes by [3, 0] and [6, 0]: E by [3, 6] and [6, 12]
    down = np.array([[1, 0], [2, 2]], np.float32)  # E changes by [0, 0] and [0, -4]
    candidates = {"up": {2: up, 3: EXPERT["up"]}, "down": {2: down}}
    found = expert_errors(X, G, EXPERT, candidates, relu, [{"up": 2, "down": 2}, {"up": 3, "gate": None}, {"down": 2}])
    assert found.single == {"up": {2: 45 + 180 / 4, 3: 0.0}, "down": {2: 16 / 4}}
    assert found.joint == (45 + (6**2 + 8**2) / 4, 0.0, 16 / 4)
    assert found.removed == 45 + 100 / 4
    nothing = expert_errors(X[:0], G[:0], EXPERT, candidates, relu, [{"up": 2}])
    assert (nothing.single["up"][2], nothing.joint, nothing.removed) == (0.0, (0.0,), 0.0)


@pytest.mark.parametrize("projection", ["up", "gate", "down", "gate_up"])
def test_single_errors_are_joint_ones_of_one_projection(projection: str) -> None:
    weights = {"up": floats(256, 256), "gate": floats(256, 256), "down": floats(256, 256)}
    if projection == "gate_up":
        weights = {"gate_up": np.concatenate([weights["gate"], weights["up"]]), "down": weights["down"]}
    kinds = {kind: dequantize(quantize(weights[projection], kind), kind, 256) for kind in (10, 12, 14)}
    x, g = floats(3000, 256) * 10, np.abs(floats(3000))
    joint = [{projection: kind} for kind in kinds]
    found = expert_errors(x, g, weights, {projection: kinds}, silu, joint)
    single = list(found.single[projection].values())
    assert single == pytest.approx(found.joint, rel=1e-4)
    assert found.removed > single[0] > single[1] > single[2] > 0
    difference = expert_output(x, {**weights, projection: kinds[10]}, silu) - expert_output(x, weights, silu)
    assert single[0] == pytest.approx(float(((g[:, None] * difference) ** 2).sum()), rel=1e-4)


def test_activations_are_those_of_ggml() -> None:
    x = np.array([-200.0, -1.0, 0.0, 0.5, 3.0], np.float32)
    assert silu(x) == pytest.approx([0, -0.26894142, 0, 0.31122967, 2.8577224], rel=1e-6)
    assert gelu(x) == pytest.approx([0, -0.15880801, 0, 0.34571401, 2.9963627], rel=1e-5)
    assert relu(x).tolist() == [0, 0, 0, 0.5, 3] and relu_squared(x).tolist() == [0, 0, 0, 0.25, 9]
    assert all(each(x).dtype == np.float32 for each in (silu, gelu, relu, relu_squared))


def test_every_architecture_has_an_activation_or_a_reason() -> None:
    assert set(ACTIVATIONS) | set(REFUSED) == set(ARCHITECTURES) and not set(ACTIVATIONS) & set(REFUSED)
    assert find_activation("olmoe", "m.gguf") is silu and find_activation("grok", "m.gguf") is gelu
    with pytest.raises(UnknownName, match=r"m\.gguf: --calibrate does not know the experts of 'gpt-oss': .*clamped"):
        find_activation("gpt-oss", "m.gguf")
    with pytest.raises(UnknownName, match="did you mean 'olmoe'"):
        find_activation("olmo", "m.gguf")


def test_column_importance_is_the_mean_square() -> None:
    hidden = expert_hidden(X, EXPERT, relu)
    found = column_importance(X, hidden)
    assert found.of("up").tolist() == found.of("gate_up").tolist() == [5, 2.5]
    assert found.of("down").tolist() == [22.5, 8]
    weighted = column_importance(X, hidden, G)  # squares of the gate weights 1 and 1/4
    assert weighted.inputs == pytest.approx([(1 + 9 / 4) / 1.25, (4 + 1 / 4) / 1.25])
    assert column_importance(X[:0], hidden[:0]).inputs.tolist() == [0, 0]
