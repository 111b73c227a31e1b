"""`moe-edge show`: levels and types, and a calibration as text, JSON and picture."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from moe_edge.convert.convert import convert
from moe_edge.models.calibration import Calibration, Setting
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import MissingFile, UsageError
from moe_edge.models.store.store import open_model
from moe_edge.runner.calibrate.picture import draw_calibration
from moe_edge.runner.measure.show import calibration_text, describe, describe_calibration, describe_text
from moe_edge.schedulers.policies.depth import calibrated, cosine
from random_models import write_random_model
from test_calibration import make_calibration

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
N_LAYERS, N_EXPERTS, N_TOKENS = 2, 8, 1000


def worked_calibration(n_levels: int = 2) -> Calibration:
    """To check by hand: expert e of layer l has 100 * (e + 1) uses, error l + e at low, 10 times that skipped."""
    made = make_calibration(N_LAYERS, N_EXPERTS, n_levels)
    e, layer = np.arange(N_EXPERTS), np.arange(N_LAYERS)[:, None]
    low = (layer + e).astype(np.float64)
    return replace(
        made,
        n_tokens=N_TOKENS,
        counts=np.tile(100 * (e + 1), (N_LAYERS, 1)),
        mean_gate=np.full((N_LAYERS, N_EXPERTS), 0.5),
        squares=np.ones((N_LAYERS, N_EXPERTS)),
        sensitivity=np.array([2.0, 0.5]),
        error=np.stack([*(0 * low, low)[:n_levels], 10 * low], axis=-1),
        settings=(Setting("damage", "low", 0.25, 0.125, 0.5), Setting("dymoe", "skip", 0.75, 0.0625, 0.75)),
    )


@pytest.fixture(scope="module")
def two_levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("show")
    source = write_random_model(folder / "m.gguf", "qwen3moe", expert_type="F16")
    convert(source, folder / "c.gguf", "Q8_0", low_type="Q4_0", calibration=worked_calibration())
    return folder / "c.gguf"


def test_levels_are_told_with_types_and_bits(two_levels: Path) -> None:
    facts = describe(two_levels, n_ctx=64, n_threads=1)
    assert facts["level_types"] == {
        "high": {"down Q8_0": 16, "gate Q8_0": 16, "up Q8_0": 16},
        "low": {"down Q4_0": 16, "gate Q4_0": 16, "up Q4_0": 16},
    }
    assert facts["bits_per_weight"] == {"high": 8.5, "low": 4.5}
    assert facts["expert_types"] == {  # both levels, sorted
        "down Q4_0": 16, "down Q8_0": 16, "gate Q4_0": 16, "gate Q8_0": 16, "up Q4_0": 16, "up Q8_0": 16,
    }  # fmt: skip
    assert facts["is_calibrated"]
    text = describe_text(facts)
    assert "  high       8.50 bits a weight: down Q8_0 (16), gate Q8_0 (16), up Q8_0 (16)\n" in text
    assert "  low        4.50 bits a weight: down Q4_0 (16)" in text and "see --calibration" in text


def test_a_stock_model_has_one_level_and_no_calibration() -> None:
    facts = describe(tiny_model_path(), n_ctx=64, n_threads=1)
    assert facts["bits_per_weight"] == {"high": 8.5} and not facts["is_calibrated"]
    text = describe_text(facts)
    assert text.count("bits a weight") == 1 and "in place" in text and "--calibration" not in text
    with pytest.raises(UsageError, match=r"tiny-moe.*has no calibration; convert it with .*--calibrate"):
        describe_calibration(tiny_model_path())


def test_the_facts_are_those_of_the_calibration(two_levels: Path) -> None:
    facts = json.loads(json.dumps(describe_calibration(two_levels), allow_nan=False))
    c = open_model(two_levels).calibration
    assert c is not None
    for name in ("counts", "mean_gate", "squares", "sensitivity", "error", "cumulated", "use_damage"):
        assert np.array_equal(facts[name], getattr(c, name)), name
    assert np.array_equal(facts["damage"], c.damage())
    assert facts["damage_levels"] == ["high", "low", "skip"] and facts["levels"] == ["high", "low"]
    assert (facts["text_sha256"], facts["n_tokens"]) == (c.text_sha256, N_TOKENS)
    assert [tuple(row.values()) for row in facts["settings"]] == [
        ("damage", "low", 0.25, 0.125, 0.5, 0.0), ("dymoe", "skip", 0.75, 0.0625, 0.75, 0.0),
    ]  # fmt: skip
    first, second = facts["layers"]
    assert (first["layer"], first["n_expert"], first["sensitivity"], first["mean_gate"]) == (0, 8, 2.0, 0.5)
    assert first["most_used"] == {"expert": 7, "share": 8 / 36}
    assert first["least_used"] == {"expert": 0, "share": 1 / 36}
    # layer 0: errors 0 to 7, 28 in all, times 2 nats over 1000 tokens; layer 1: 1 to 8, 36, times 0.5
    assert first["damage"] == pytest.approx({"high": 0, "low": 0.056, "skip": 0.56})
    assert second["damage"] == pytest.approx({"high": 0, "low": 0.018, "skip": 0.18})
    assert [each["retention_cosine"] for each in facts["layers"]] == list(cosine(0.75, 2))
    assert [each["retention_calibrated"] for each in facts["layers"]] == list(calibrated(0.75, c))


def test_the_most_fragile_experts_come_first_and_harmless_ones_not_at_all(two_levels: Path) -> None:
    fragile = describe_calibration(two_levels)["fragile"]
    assert [(each["layer"], each["expert"]) for each in fragile[:3]] == [(0, 7), (0, 6), (0, 5)]
    assert fragile[0]["damage"] == pytest.approx(7 * 2 / 1000) and fragile[0]["share"] == 8 / 36
    assert len(fragile) == 10 and (0, 0) not in [(each["layer"], each["expert"]) for each in fragile]


def test_the_text_names_everything(two_levels: Path) -> None:
    text = calibration_text(describe_calibration(two_levels))
    assert "calibrated on 1000 tokens of the text abababababababab; high 8.50 bits a weight, low 4.50" in text
    rows = text.splitlines()
    (row,) = [line.split() for line in rows if line.split()[:2] == ["0", "2"]]
    assert row[2:9] == ["7", "22.2%", "0", "2.8%", "0.500", "0", "0.056"]
    assert "most damage when low" in text and "  block 0 expert 7: 0.014, 22.2% of the uses" in text
    assert [line.split() for line in rows[-2:]] == [
        ["damage", "price", "0.25", "low", "0.125", "50%"],
        ["dymoe", "retention", "0.75", "skip", "0.0625", "75%"],
    ]
    t1, t2 = (float(n) for n in next(line for line in rows if line.startswith("hobbit")).replace(",", "").split()[2::2])
    cumulated = describe_calibration(two_levels)["cumulated"]
    assert (t1, t2) == (pytest.approx(cumulated[67], abs=1e-3), pytest.approx(cumulated[97], abs=1e-3))  # type: ignore[comparison-overlap]


def test_a_model_of_one_level_is_told_about_skipping(tmp_path: Path) -> None:
    source = write_random_model(tmp_path / "m.gguf", "qwen3moe", expert_type="Q8_0")
    made = replace(worked_calibration(1), settings=())
    convert(source, tmp_path / "c.gguf", calibration=made)
    facts = describe_calibration(tmp_path / "c.gguf")
    assert facts["damage_levels"] == ["high", "skip"] and len(facts["fragile"]) == 10
    assert facts["fragile"][0]["damage"] == pytest.approx(70 * 2 / 1000)
    text = calibration_text(facts)
    assert "most damage when skipped" in text and "no settings were measured" in text


def test_without_matplotlib_the_install_command_is_named(
    two_levels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install 'moe-edge\[bench\]'"):
        draw_calibration(describe_calibration(two_levels), tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib: pip install 'moe-edge[bench]'")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_picture_is_drawn(two_levels: Path, tmp_path: Path) -> None:
    facts = describe_calibration(two_levels)
    draw_calibration(facts, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    nothing = facts | {"damage": (0 * np.asarray(facts["damage"])).tolist()}
    draw_calibration(nothing, tmp_path / "q.svg")
    assert "layers" in facts and (tmp_path / "q.svg").stat().st_size > 1000
    with pytest.raises(UsageError, match="xyz"):
        draw_calibration(facts, tmp_path / "p.xyz")
    with pytest.raises(MissingFile, match="nowhere"):
        draw_calibration(facts, tmp_path / "nowhere" / "p.png")
