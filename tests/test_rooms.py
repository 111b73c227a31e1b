"""Imports between the rooms go one way, and some things are known in one place only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "models": {"models"},
    "schedulers": {"schedulers", "models"},
    "convert": {"convert", "schedulers", "models"},
    "runner": {"runner", "convert", "schedulers", "models"},
}
NO_NUMBERS_OR_C = {"schedulers": {"ctypes", "llama_cpp", "os", "pathlib"}, "models": {"ctypes", "llama_cpp"}}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("room", ALLOWED)
def test_no_import_runs_upwards(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for name in imports(path):
            package, _, rest = name.partition(".")
            if package == "moe_edge" and rest:
                assert rest.split(".")[0] in ALLOWED[room], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", NO_NUMBERS_OR_C)
def test_policy_and_models_touch_no_files_and_no_libraries(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        if path.name == "embedded.py":  # says where the embedded model lies
            continue
        for name in imports(path):
            assert name.split(".")[0] not in NO_NUMBERS_OR_C[room], f"{path.relative_to(ROOT)} imports {name}"


def test_chat_formats_know_no_llama_cpp() -> None:
    for path in (ROOT / "runner" / "chatformat").glob("*.py"):
        assert not any(name.startswith("llama_cpp") for name in imports(path)), path


def test_the_log_of_llama_cpp_is_taken_in_one_place() -> None:
    """prove_child.py wraps it in a child of its own, before anything is loaded there."""
    users = {
        path.name for path in (ROOT / "runner").rglob("*.py") if "llama_log_set" in path.read_text()
    }
    assert users == {"llama.py", "prove_child.py"}
