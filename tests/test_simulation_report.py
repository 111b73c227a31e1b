"""What simulate prints and draws, and which budgets it takes."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import open_engine
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import BudgetTooSmall, UnknownName, UsageError
from moe_edge.runner.measure.record import record_trace
from moe_edge.runner.measure.simulation import (
    SimBudget,
    budget_of_ram,
    even_budgets,
    policies_named,
    policy_label,
    run_simulations,
)
from moe_edge.runner.measure.simulation_plot import plot_simulation
from moe_edge.schedulers.budget import FixedSizes
from moe_edge.schedulers.eviction import RULES
from moe_edge.schedulers.lookahead.rules import LOOKAHEADS
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies import POLICY_NAMES
from test_simulate import one_layer


def test_ram_becomes_the_arena_the_engine_would_make() -> None:
    with open_engine(tiny_model_path(), "middle", n_ctx=32, n_ubatch=16, n_threads=1) as engine:
        trace, plan = record_trace(engine, [1, 2, 3]), engine.plan
    assert budget_of_ram(trace, plan.budget_bytes) == SimBudget(plan.arena_bytes, plan.budget_bytes)
    with pytest.raises(BudgetTooSmall, match="is too small"):
        budget_of_ram(trace, plan.floor_bytes - 1)
    with pytest.raises(UsageError, match="give the bytes of the expert arena instead"):
        budget_of_ram(replace(trace, fixed=None), plan.budget_bytes)


def test_budgets_in_equal_steps_go_from_the_floor_to_all_experts() -> None:
    trace = replace(one_layer([0], n_experts=8), fixed=FixedSizes(0, 0, 0, 0))
    assert [b.arena_bytes for b in even_budgets(trace, 4)] == [20, 40, 60, 80]
    assert [b.arena_bytes for b in even_budgets(trace, 1)] == [20]


def test_names_of_policies() -> None:
    every = policies_named("all")
    assert [(o.name, o.cache) for o in every if o.name == "exact"] == [("exact", rule) for rule in RULES]
    assert [(o.name, o.cache) for o in every if o.name != "exact"] == [(name, "auto") for name in POLICY_NAMES[1:]]
    assert [(o.name, o.cache) for o in policies_named("all", caches="lru")] == [(name, "lru") for name in POLICY_NAMES]
    assert [o.lookahead for o in policies_named("exact", lookaheads="all")] == list(LOOKAHEADS)
    assert policies_named("hobbit, exact", PolicyOptions(t1=0.5)) == [
        PolicyOptions("hobbit", t1=0.5), PolicyOptions("exact", t1=0.5),
    ]  # fmt: skip
    assert policy_label(PolicyOptions("hobbit", t1=0.5, cache="lru", lookahead="votes")) == "hobbit t1=0.5"
    with pytest.raises(UnknownName, match="unknown policy 'lfru'; known: all, exact, dymoe, hobbit, damage"):
        policies_named("lfru")
    with pytest.raises(UnknownName, match="unknown cache rule 'mru'; known: all, auto, learned"):
        policies_named("exact", caches="lru,mru")
    with pytest.raises(UnknownName, match="unknown look-ahead 'far'; known: all, off, single"):
        policies_named("exact", lookaheads="far")


def test_a_picture_without_matplotlib_names_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    s = run_simulations(one_layer([0]), [SimBudget(20)], policies_named("exact"))
    with pytest.raises(UsageError, match=r"pip install 'moe-edge\[bench\]'"):
        plot_simulation(s, tmp_path / "p.png")


def test_a_picture_has_a_curve_for_every_rule_in_every_panel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, list[float]]] = []

    class Axes:
        def plot(self, x: list[float], y: list[float], *, label: str, **_how: object) -> None:
            assert x == sorted(x) and len(x) == len(y) == 3
            drawn.append((label, y))

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **__: None

    pyplot = types.SimpleNamespace(subplots=lambda _rows, n, **_: (Axes(), [Axes()] * n), close=lambda _: None)
    monkeypatch.setitem(sys.modules, "matplotlib", types.SimpleNamespace(use=lambda _: None))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    trace = one_layer([0], [1], [2], [0], [1], [2])
    s = run_simulations(trace, even_budgets(trace, 3), policies_named("exact", caches="lru,decayed"))
    plot_simulation(s, tmp_path / "p.png")
    assert [label for label, _ in drawn] == ["belady", "exact, lru", "exact, decayed"] * 3
    assert drawn[1][1] == [100 * row.hit_rate for row in s.rows if row.cache == "lru"]


def test_a_picture_of_every_policy(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trace = one_layer([0], [1], [2], [0], [1], [2])
    s = run_simulations(trace, even_budgets(trace, 3), policies_named("exact,hobbit"))
    plot_simulation(s, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
