"""The usage file of --warm-start: what is kept, and that a file of no use costs one sentence and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from moe_edge.runner.warm import load_usage, save_usage, usage_path
from moe_edge.schedulers.layout import Layout, Step
from moe_edge.schedulers.usage import Usage

LAYOUT = Layout((2, 3), 1, (10,) * 5)


def some_usage() -> Usage:
    usage = Usage(LAYOUT.n_experts)
    usage.note(Step(0, [1], [1]))
    usage.note(Step(1, [0, 2], [1, 1]))
    return usage


def test_it_lies_beside_the_cached_skeletons_named_after_the_store(tmp_path: Path) -> None:
    assert usage_path("abc", tmp_path) == tmp_path / "skeletons" / "abc.usage.npz"
    assert usage_path("abc").parent.name == "skeletons"  # tests/conftest.py sets MOE_EDGE_CACHE


def test_what_was_counted_comes_back(tmp_path: Path) -> None:
    path = usage_path("abc", tmp_path)
    assert save_usage(path, some_usage()) is None
    usage, said = load_usage(path, LAYOUT)
    assert (said, usage.tokens, usage.counts) == (None, 1, [0, 1, 1, 0, 1])
    usage.note(Step(0, [0], [1]))
    assert save_usage(path, usage) is None
    assert load_usage(path, LAYOUT)[0].counts == pytest.approx([1, 1, 1, 0, 1], abs=1e-3)
    assert [each.name for each in path.parent.iterdir()] == ["abc.usage.npz"]  # nothing left of the writing


def test_without_a_file_nothing_is_known_and_nothing_said(tmp_path: Path) -> None:
    usage, said = load_usage(tmp_path / "none.npz", LAYOUT)
    assert (said, usage.tokens, usage.rates()) == (None, 0, [0.0] * 5)


@pytest.mark.parametrize("cut", [0, 1, 30, 200, -1, -30])
def test_a_cut_file_is_ignored_with_a_sentence(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "u.npz"
    save_usage(path, some_usage())
    path.write_bytes(path.read_bytes()[:cut])
    usage, said = load_usage(path, LAYOUT)
    assert usage.tokens == 0
    assert said is not None and said.startswith(f"{path}: ") and said.endswith("starting without") and "\n" not in said


@pytest.mark.parametrize("at", range(0, 900, 37))
def test_a_damaged_byte_is_harmless(tmp_path: Path, at: int) -> None:
    path = tmp_path / "u.npz"
    save_usage(path, some_usage())
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 0xFF
    path.write_bytes(data)
    usage, said = load_usage(path, LAYOUT)
    assert usage.counts in ([0.0] * 5, [0, 1, 1, 0, 1]) and (said is None or "starting without" in said)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": np.int32(9)}, "is of version 9, not 1"),
        ({"n_experts": np.array([2, 4], np.int32)}, "does not fit the model"),
        ({"counts": np.zeros(4)}, "does not fit the model"),
        ({"counts": np.array([0, 1, -1, 0, 0.0])}, "does not fit the model"),
        ({"counts": np.array([0, 1, np.nan, 0, 0.0])}, "does not fit the model"),
        ({"tokens": np.float64("nan")}, "does not fit the model"),
        ({"tokens": np.zeros(3)}, "cannot be read"),
        ({"counts": np.array([{}] * 5, object)}, "cannot be read"),
        ({"n_experts": None}, "cannot be read"),
    ],
)
def test_a_file_of_something_else_is_ignored_with_a_sentence(
    tmp_path: Path, change: dict[str, object], says: str
) -> None:
    parts: dict[str, object] = {
        "version": np.int32(1), "n_experts": np.array([2, 3], np.int32), "tokens": np.float64(3), "counts": np.ones(5)
    }  # fmt: skip
    parts |= change
    np.savez(tmp_path / "u.npz", **{name: part for name, part in parts.items() if part is not None})  # type: ignore[arg-type]
    usage, said = load_usage(tmp_path / "u.npz", LAYOUT)
    assert usage.tokens == 0 and said is not None and says in said


def test_a_folder_that_cannot_be_written_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = save_usage(tmp_path / "file" / "u.npz", some_usage())
    assert said is not None and "the usage cannot be kept" in said
    (tmp_path / "taken.npz").mkdir()
    said = save_usage(tmp_path / "taken.npz", some_usage())
    assert said is not None and "the usage cannot be kept" in said
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "taken.npz"]
