"""A calibration keeps --ram too: what it holds beside the model is counted, and its files leave the page cache."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from moe_edge.convert.checkpoints import open_source
from moe_edge.models.errors import BudgetTooSmall
from moe_edge.runner.calibrate import measured_settings
from moe_edge.runner.calibrate.expert_weights import ExpertWeights
from moe_edge.runner.calibrate.observe import LayerView
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.sizes import sizes_of
from moe_edge.schedulers.budget import MIB, PROGRAM_ALLOWANCE_BYTES
from random_models import write_big_model
from test_memory_limit import Cgroup, cached_bytes, cgroup

__all__ = ["cgroup"]  # a fixture
ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys
from pathlib import Path
from moe_edge.convert.conversion_plan import ExpertTypes
from moe_edge.runner.calibrate.calibrate import CalibrateOptions, convert_calibrated
source, text, output = map(Path, sys.argv[1:4])
options = CalibrateOptions(
    text, types=("Q2_K", "Q3_K", "Q4_K"), n_tokens=1024, sensitivity_tokens=512, settings_tokens=0, n_threads=1,
    ram_bytes=int(sys.argv[4]),
)
convert_calibrated(source, output, ExpertTypes(), options, bits=4.0, low_bits=3.0, tell=lambda s: print(s, flush=True))
"""


@pytest.mark.cgroup
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory cgroups are Linux's")
def test_a_calibration_stays_within_ram_and_the_allowance(tmp_path: Path, cgroup: Cgroup) -> None:
    """At a --ram that its model does not fit into: the engine would fill it, and the calibration needs some beside."""
    model = write_big_model(tmp_path / "big.gguf", n_layer=2, n_expert=44, n_embd=2048, n_ff=768, n_used=4)
    text = tmp_path / "text.txt"
    text.write_bytes(b"".join((ROOT / name).read_bytes() for name in ("README.md", "docs/FORMAT.md", "docs/LOG.md")))
    plan = sizes_of(model, EngineOptions(n_ctx=512)).plan
    ram = (plan.floor_bytes + plan.resident_bytes) // 2
    assert plan.resident_bytes - ram > 100 * MIB
    cgroup.limit(ram + PROGRAM_ALLOWANCE_BYTES)
    output = tmp_path / "out.gguf"
    done = cgroup.run([sys.executable, "-c", PROGRAM, str(model), str(text), str(output), str(ram)])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "forecast: " in done.stdout  # the rehearsal ran, which is what needs most
    assert output.exists() and cgroup.peak_bytes() <= ram + PROGRAM_ALLOWANCE_BYTES


def test_what_the_program_will_hold_is_counted_like_what_it_holds(
    random_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("qwen3moe")

    def excess(beside: int, charge: bool = True) -> int:
        options = EngineOptions(n_ctx=256, n_threads=1, charge_program=charge, beside_bytes=beside)
        with Engine(model, options) as engine:
            return engine.plan.fixed.program_excess_bytes

    monkeypatch.setattr("moe_edge.runner.engine.current_rss_bytes", lambda: 50 * MIB)
    assert excess(0) == 0 and excess(14 * MIB) == 0
    assert excess(114 * MIB) == 100 * MIB
    assert excess(114 * MIB, charge=False) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is in memory")
def test_what_a_layer_saw_leaves_memory_and_can_be_read_again(tmp_path: Path) -> None:
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True).stdout
    if kind.strip() in ("tmpfs", "ramfs"):
        pytest.skip(f"{tmp_path} is in memory: {kind.strip()} has no pages to give back")
    path = tmp_path / "inputs.f16"
    values = np.arange(512 * 4096, dtype=np.uint16).view(np.float16).reshape(512, 4096)
    values.tofile(path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    shown = np.memmap(path, np.float16, "r", shape=values.shape)
    view = LayerView(shown, np.zeros((512, 1), np.int32), np.ones((512, 1), np.float32))
    assert len(view.rows_of(0)[0]) == 512 and cached_bytes(path) >= path.stat().st_size
    view.forget()
    assert cached_bytes(path) <= path.stat().st_size // 8
    assert view.inputs.tobytes() == values.tobytes()
    LayerView(values, view.experts, view.weights).forget()  # of an array in memory: nothing to give back
    assert values[3, 5] == view.inputs[3, 5]


def test_fewer_threads_work_on_experts_where_memory_is_short(random_model: Callable[[str], Path]) -> None:
    source = open_source(random_model("qwen3moe"))
    layer = source.layers[0]
    each = 4 * 8 * sum(rows * cols for rows, cols in (layer.shape(p) for p in layer.projections))
    for ram, n_threads in ((1 << 40, 7), (4 * each * 3 + 5, 3), (4 * each, 1), (0, 1)):
        with ExpertWeights(source, 7, ram) as weights:
            assert (weights.n_threads, weights.working_bytes) == (n_threads, n_threads * each)


def test_a_table_that_does_not_fit_beside_the_program_is_measured_all_the_same(
    monkeypatch: pytest.MonkeyPatch, random_model: Callable[[str], Path]
) -> None:
    model, told = random_model("qwen3moe"), list[str]()
    least = sizes_of(model, EngineOptions(n_ctx=512)).plan.floor_bytes
    monkeypatch.setattr("moe_edge.runner.engine.current_rss_bytes", lambda: 1 << 40)
    options = EngineOptions(ram_bytes=least + (1 << 20), n_ctx=512, charge_program=True, n_threads=1)
    with measured_settings._engine(model, options, told.append) as engine:
        assert engine.plan.fixed.program_excess_bytes == 0
    assert len(told) == 1 and "above --ram" in told[0] and "too small" in told[0]
    with pytest.raises(BudgetTooSmall):
        measured_settings._engine(model, replace(options, ram_bytes=1, charge_program=False), told.append)
