"""`plan` answers from headers alone: whether a model runs, the number that would work, and what speed to expect."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from moe_edge.convert.convert import convert
from moe_edge.models.calibration import Calibration
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import CutFile, MissingFile, NotMoE, UsageError
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.loading import Loading
from moe_edge.runner.measure import plan as plan_module
from moe_edge.runner.measure.doctor import Facts
from moe_edge.runner.measure.plan import dense_bytes_used, plan
from moe_edge.runner.measure.show import describe
from moe_edge.runner.memory import AutoBudget
from moe_edge.schedulers.estimate import MachineSpeeds
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.replay.trace import Trace
from random_models import Shape, write_random_model

MIB, GIB = 1 << 20, 1 << 30
SPEEDS = MachineSpeeds(disk=500e6, memory=20e9, compute=10e9, prefill=50e9, layer_seconds=50e-6)
OLMOE = Shape(n_expert=16, n_used=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("plan") / "m.gguf", "olmoe", OLMOE)


@pytest.mark.parametrize("arch", ["olmoe", "qwen2moe", "deepseek2", "gpt-oss"])
def test_plan_needs_the_same_memory_as_show_says(arch: str, random_model: Callable[[str], Path]) -> None:
    path = random_model(arch)
    told = describe(path, n_ctx=256)
    result = plan(path, GIB, n_ctx=256, speeds=SPEEDS)
    assert (result.needed_bytes, result.resident_bytes) == (told["ram_floor_bytes"], told["ram_resident_bytes"])
    assert result.memory is not None
    assert result.memory.fixed.kv_bytes == told["kv_bytes"]
    assert (result.will_run, result.architecture) == (True, told["architecture"])


def test_nothing_but_headers_is_read_and_nothing_is_kept(model: Path, tmp_path: Path, private_cache: Path) -> None:
    cut = tmp_path / "cut.gguf"
    whole = model.read_bytes()
    from moe_edge.models.formats.gguf import read_gguf

    cut.write_bytes(whole[: read_gguf(model).data_offset])
    before = sorted(private_cache.rglob("*"))
    full, header = (plan(path, 60 * MIB, speeds=SPEEDS) for path in (model, cut))
    assert header.memory == full.memory
    assert header.estimate == full.estimate
    assert "are on this disk; get the rest" in header.text()
    assert full.notes == ()
    assert sorted(private_cache.rglob("*")) == before
    cut.write_bytes(whole[:1000])
    with pytest.raises(CutFile):
        plan(cut, speeds=SPEEDS)


def test_split_model_needs_the_headers_of_all_parts(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "s.gguf", "olmoe", OLMOE, split=True)
    one = plan(path, GIB, speeds=SPEEDS)
    parts = sorted(tmp_path.glob("s-*.gguf"))
    os.truncate(parts[1], parts[1].stat().st_size // 2)
    assert plan(path, GIB, speeds=SPEEDS).memory == one.memory
    parts[1].unlink()
    with pytest.raises(MissingFile):
        plan(path, GIB, speeds=SPEEDS)


def test_converted_model_is_planned_before_its_store_is_complete(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "c.gguf"
    convert(model, target)
    whole = plan(target, GIB, speeds=SPEEDS)
    store = tmp_path / "c.experts.gguf"
    os.truncate(store, store.stat().st_size * 3 // 4)
    assert plan(target, GIB, speeds=SPEEDS).memory == whole.memory
    with pytest.raises(UsageError, match="is an expert store"):
        plan(store, speeds=SPEEDS)
    store.unlink()
    with pytest.raises(MissingFile, match=r"c\.experts\.gguf: the expert store of c\.gguf is missing"):
        plan(target, speeds=SPEEDS)


def test_below_the_floor_it_will_not_run_and_says_what_would(model: Path) -> None:
    result = plan(model, 8 * MIB, speeds=SPEEDS)
    assert (result.will_run, result.verdict, result.memory, result.estimate) == (False, "WILL NOT RUN", None, None)
    assert f"try --ram {-(-result.needed_bytes // MIB)}MiB or more" in result.sentence
    assert result.text().startswith("WILL NOT RUN: --ram 8MiB is too small")
    assert "moe-edge chat" not in result.text()
    assert plan(model, result.needed_bytes, speeds=SPEEDS).will_run


def test_auto_uses_what_is_free_and_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "auto_budget", lambda: AutoBudget(10 * MIB, "--ram auto is 10.0 MiB: a test"))
    low = plan(model, speeds=SPEEDS)
    assert not low.will_run
    assert "--ram auto is 10.0 MiB: a test" in low.text()
    assert plan(model, GIB, speeds=SPEEDS).notes == ("this is more than is free now; --ram auto is 10.0 MiB: a test",)
    monkeypatch.setattr(plan_module, "auto_budget", lambda: AutoBudget(GIB, "--ram auto is 1.00 GiB: a test"))
    assert plan(model, speeds=SPEEDS).sentence.endswith("m.gguf runs with --ram auto")


def test_machine_that_is_too_small_is_said_whatever_the_budget(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "usable_bytes", lambda: 4 * MIB)
    result = plan(model, GIB, speeds=SPEEDS)
    assert not result.will_run
    assert "needs at least --ram" in result.sentence and "this machine has 4.0 MiB" in result.sentence


def test_text_has_the_split_the_band_and_the_command(model: Path) -> None:
    floor, resident = (plan(model, n, speeds=SPEEDS) for n in (plan(model, GIB, speeds=SPEEDS).needed_bytes, GIB))
    assert resident.estimate is not None and floor.estimate is not None
    assert resident.estimate.resident and not floor.estimate.resident
    assert floor.estimate.tokens_per_second.expected < resident.estimate.tokens_per_second.expected
    text = floor.text()
    for word in ("split", "decode", "tok/s", "hits", "traffic", "prompt", "enough", "command", "below one token's"):
        assert word in text
    assert json.loads(json.dumps(floor.to_json()))["estimate"]["binds"] == floor.estimate.binds
    assert floor.enough_bytes is not None
    assert floor.needed_bytes <= floor.enough_bytes <= floor.resident_bytes


def test_a_given_disk_speed_replaces_the_measured_one(model: Path) -> None:
    floor = plan(model, GIB, speeds=SPEEDS).needed_bytes
    slow, fast = (plan(model, floor, speeds=SPEEDS, disk_bytes_per_second=d) for d in (1e6, 440e6))
    assert slow.estimate is not None and fast.estimate is not None and slow.speeds == replace(SPEEDS, disk=1e6)
    assert slow.estimate.tokens_per_second.expected < fast.estimate.tokens_per_second.expected / 100
    assert (slow.estimate.binds, slow.verdict) == ("disk", "SLOW")


def test_without_speeds_there_is_a_split_and_the_reason(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(*_: object, **__: object) -> Facts:
        return {"storage": {"why_not": "no direct reads"}}

    monkeypatch.setattr(plan_module, "doctor", blind)
    result = plan(model, GIB)
    assert (result.will_run, result.verdict, result.estimate) == (True, "RUNS", None)
    assert "no estimate: no direct reads" in result.text()


def test_hit_rate_of_a_trace_is_simulated(model: Path) -> None:
    with_all = plan(model, GIB, speeds=SPEEDS)
    engine = Engine(model, EngineOptions(ram_bytes=GIB))
    layout: Layout = engine.layout
    engine.close()
    n_tokens = 40
    rng = np.random.default_rng(0)
    experts = np.stack([np.stack([rng.choice(4, 2, replace=False) for _ in range(2)]) for _ in range(n_tokens)])
    units = np.array(layout.unit_bytes, np.int64)
    trace = Trace(
        "m.gguf", "", layout.n_experts, 1, units, units, np.ones(n_tokens, np.int32), np.zeros(1, np.int32),
        np.ones((n_tokens, 2), np.int32), experts.astype(np.int16), np.full(experts.shape, 0.5, np.float32),
    )  # fmt: skip
    budget = with_all.resident_bytes - 8 * int(units[0])
    result = plan(model, budget, speeds=SPEEDS, trace=trace)
    assert result.estimate is not None
    assert (result.estimate.hit_source, result.estimate.hit_rate.expected) == ("trace", pytest.approx(152 / 160))  # type: ignore[comparison-overlap]
    assert "by simulating the trace" in result.text()
    with pytest.raises(UsageError, match=r"the trace is of m\.gguf, whose experts are others"):
        plan(tiny_model_path(), speeds=SPEEDS, trace=trace)
    given = plan(model, budget, speeds=SPEEDS, hit_rate=0.5).estimate
    assert given is not None and given.hit_rate.expected == 0.5
    with pytest.raises(UsageError, match="not between 0 and 1"):
        plan(model, budget, speeds=SPEEDS, hit_rate=50)


def test_counts_of_a_calibration_are_used(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.ones((2, 16), np.int64)
    counts[:, :2] = 1000
    zeros = np.zeros((2, 16))
    made = Calibration(
        "", 1000, ("high",), counts, zeros, zeros, np.zeros(2), np.zeros((2, 16, 2)), np.zeros(101), np.zeros((2, 101))
    )
    opened = Loading.__init__

    def with_calibration(self: Loading, *args: object, **kwargs: object) -> None:
        opened(self, *args, **kwargs)  # type: ignore[arg-type]
        object.__setattr__(self.model, "calibration", made)

    monkeypatch.setattr(Loading, "__init__", with_calibration)
    whole = plan(model, GIB, speeds=SPEEDS)
    assert whole.memory is not None
    half = plan(model, whole.resident_bytes - whole.memory.arena_bytes // 2, speeds=SPEEDS).estimate
    assert half is not None
    assert half.hit_source == "calibration"
    assert half.hit_rate.expected > 0.98


def test_dense_bytes_leave_out_stubs_and_a_table_that_is_only_looked_up(model: Path) -> None:
    from moe_edge.models.formats.gguf import read_gguf

    tensors = read_gguf(model).tensors
    used = dense_bytes_used(read_gguf(model))
    left_out = sum(t.nbytes for n, t in tensors.items() if "_exps" in n or n == "token_embd.weight")
    assert ("output.weight" in tensors, used) == (True, sum(t.nbytes for t in tensors.values()) - left_out)


def test_model_without_experts_is_refused_as_everywhere(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "dense.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(NotMoE):
        plan(tmp_path / "dense.gguf", speeds=SPEEDS)


@pytest.mark.slow
def test_embedded_model_is_planned_with_what_the_doctor_measures() -> None:
    result = plan(tiny_model_path(), 40 * MIB)
    assert result.will_run and result.estimate is not None and result.speeds is not None
    assert result.estimate.tokens_per_second.low > 1
    again = plan(tiny_model_path(), 40 * MIB)
    assert again.speeds == result.speeds  # from the doctor's cache
