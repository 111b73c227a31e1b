"""A new rule is one new file: what the registries find, and that everything which offers them asks the registry."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from moe_edge.models.registry import collect
from moe_edge.runner.cli import main
from moe_edge.runner.commands.parameters import SECTIONS
from moe_edge.schedulers import eviction, policies
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.lookahead import rules
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policy import make_policy
from test_policies import calibration


@dataclass(frozen=True)
class Fruit:
    name: str
    order: int


@pytest.fixture
def orchard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package without modules yet; they may import Fruit from here."""
    folder = tmp_path / "orchard"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "orchard"]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def plant(folder: Path, file: str, text: str) -> None:
    (folder / f"{file}.py").write_text(f"from test_registry import Fruit\n{text}\n")


def test_entries_are_found_by_order_and_other_files_are_left_alone(orchard: Path) -> None:
    plant(orchard, "pears", "FRUIT = Fruit('pear', 20)")
    plant(orchard, "apples", "FRUIT = Fruit('apple', 10)")
    plant(orchard, "tools", "LADDER = 1")
    plant(orchard, "stones", "FRUIT = 'not a fruit'")
    found = collect("orchard", [str(orchard)], "FRUIT", Fruit)
    assert list(found) == ["apple", "pear"]


def test_two_files_with_one_name_are_refused(orchard: Path) -> None:
    plant(orchard, "pears", "FRUIT = Fruit('pear', 20)")
    plant(orchard, "other_pears", "FRUIT = Fruit('pear', 30)")
    with pytest.raises(TypeError, match=r"orchard: two files offer the same FRUIT: \['pear', 'pear'\]"):
        collect("orchard", [str(orchard)], "FRUIT", Fruit)


@pytest.mark.parametrize("entries", [eviction.ENTRIES, policies.POLICIES, rules.ENTRIES])
def test_the_command_line_shows_what_the_registry_has(entries: dict[str, object]) -> None:
    shown = " ".join(CliRunner().invoke(main, ["chat", "--help"], terminal_width=10_000).output.split())
    for name, entry in entries.items():
        assert f"{name}: {entry.words}" in shown  # type: ignore[attr-defined]


def test_every_knob_is_an_option_that_names_who_listens() -> None:
    shown = " ".join(CliRunner().invoke(main, ["generate", "--help"], terminal_width=10_000).output.split())
    for knob in policies.KNOBS.values():
        assert (f"{knob.option} " in shown) is not knob.hidden
        if not knob.hidden:
            assert f"{', '.join(policies.who_listens(knob))}: {knob.words}" in shown


@pytest.mark.parametrize("name", policies.POLICY_NAMES)
def test_a_policy_says_its_own_name_everywhere(name: str) -> None:
    layout = Layout((4,), 2, (10,) * 8)
    made = make_policy(PolicyOptions(name), layout, 80, calibration())
    assert made.name == policies.find_policy(name).name == name


def test_help_shows_what_everybody_uses_first() -> None:
    shown = CliRunner().invoke(main, ["chat", "--help"]).output
    sections = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections == [f"{section}:" for section in SECTIONS]
    everyday = shown.split("\nSampling:")[0]
    for option in ("--model", "--ram", "--ctx-size", "--threads"):
        assert option in everyday
    for option in ("--policy", "--cache", "--lookahead", "--retention"):
        assert option not in everyday
