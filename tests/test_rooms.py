"""The house: imports go one way, some things are known in one place only, files and functions are short."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("models", "schedulers", "convert", "runner")  # a room imports those before it, and itself
LONGEST_FILE, LONGEST_FUNCTION = 500, 60  # lines: of Python, of C++

# Who imports llama_cpp, and why it is not behind runner/llama.py.
LLAMA_CPP = {
    "moe_edge.runner.llama": "the door: loading, logs, threads, KV cache",
    "moe_edge.runner.llama_package": "asks which package it is, and whether it loads",
    "moe_edge.runner.tokens": "its vocabulary; below the door, which uses it",
    "moe_edge.runner.sampling": "its samplers and grammars",
    "moe_edge.runner.serve.schema": "its grammar of a JSON schema",
    "moe_edge.runner.serve.engine_model": "the number of parameters, for clients that ask",
    "moe_edge.runner.capi": "its libraries are loaded before ours",
    "moe_edge.runner.native": "its thread pools",
    "moe_edge.runner.prove_child": "a process of its own, which wraps the log before anything is loaded",
    "moe_edge.runner.measure.logits": "llama_decode with the logits of chosen positions",
    "moe_edge.runner.measure.doctor": "says which release this is",
    "moe_edge.runner.measure.probe": "times ggml's products by themselves",
    "moe_edge.convert.quantize": "ggml's quantizers",
    "moe_edge.convert.tokenizer_proof": "compares vocabularies before there is a model",
}
CTYPES = {
    "moe_edge.runner.capi", "moe_edge.runner.native", "moe_edge.runner.llama", "moe_edge.runner.tokens",
    "moe_edge.runner.neighbours", "moe_edge.runner.sampling", "moe_edge.runner.measure.probe",
    "moe_edge.runner.zstd", "moe_edge.convert.quantize", "moe_edge.runner.workers.guard",
}  # fmt: skip
CONVERTERS = ("moe_edge.runner.commands", "moe_edge.runner.calibrate")  # of runner, who may import convert


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("moe_edge", include_external_packages=True, cache_dir=None)


def ours(graph: grimp.ImportGraph) -> Iterator[tuple[str, str]]:
    """(module, module of ours that it imports)."""
    for module in graph.modules:
        if module.startswith("moe_edge."):
            for imported in graph.find_modules_directly_imported_by(module):
                if imported.startswith("moe_edge"):
                    yield module, imported


def room(module: str) -> int:
    return ROOMS.index(module.split(".")[1])


def test_no_import_runs_upwards(graph: grimp.ImportGraph) -> None:
    upwards = [(a, b) for a, b in ours(graph) if b != "moe_edge" and room(b) > room(a)]
    assert not [pair for pair in upwards if pair[0] != "moe_edge.runner.package_init"]
    assert sum(1 for _ in ours(graph)) > 300  # the graph is there


def test_there_are_no_circles(graph: grimp.ImportGraph) -> None:
    after: dict[str, set[str]] = {}
    for a, b in ours(graph):
        after.setdefault(a, set()).add(b)
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for each in after.get(module, ()):
                walk(each, (*path, module))
            done.add(module)

    for module in after:
        walk(module, ())


def test_what_runs_a_model_does_not_import_what_converts_one(graph: grimp.ImportGraph) -> None:
    for a, b in ours(graph):
        if b.startswith("moe_edge.convert") and a.startswith("moe_edge.runner"):
            assert a.startswith(CONVERTERS), f"{a} imports {b}"


def test_llama_cpp_and_ctypes_are_known_where_they_must_be(graph: grimp.ImportGraph) -> None:
    assert graph.find_modules_that_directly_import("llama_cpp") == set(LLAMA_CPP)
    assert graph.find_modules_that_directly_import("ctypes") == CTYPES


@pytest.mark.parametrize("name", ["os", "pathlib", "ctypes", "llama_cpp", "subprocess"])
def test_policy_touches_no_files_and_no_libraries(graph: grimp.ImportGraph, name: str) -> None:
    users = graph.find_modules_that_directly_import(name) if name in graph.modules else set()
    assert not [user for user in users if user.startswith("moe_edge.schedulers")]


def test_chat_formats_are_pure(graph: grimp.ImportGraph) -> None:
    allowed = ("moe_edge.runner.chatformat", "moe_edge.models.registry", "moe_edge.models.errors")
    for a, b in ours(graph):
        if a.startswith("moe_edge.runner.chatformat"):
            assert b.startswith(allowed), f"{a} imports {b}"


def test_the_log_of_llama_cpp_is_taken_in_one_place() -> None:
    """prove_child.py wraps it in a child of its own, before anything is loaded there."""
    users = {path.name for path in (ROOT / "runner").rglob("*.py") if "llama_log_set" in path.read_text()}
    assert users == {"llama.py", "prove_child.py"}


def test_files_of_python_are_short() -> None:
    folders = ("convert", "models", "schedulers", "runner", "tests", "bench", "examples")
    lengths = {
        path.relative_to(ROOT): len(path.read_text().splitlines())
        for folder in folders for path in (ROOT / folder).rglob("*.py")
    }  # fmt: skip
    assert len(lengths) > 200
    assert not {path: n for path, n in lengths.items() if n > LONGEST_FILE}


def test_functions_of_cpp_are_short() -> None:
    """By their first line and the brace that closes it at the margin, as all of ours are written."""
    counted = 0
    for path in [*(ROOT / "native").glob("*.cpp"), *(ROOT / "native").glob("*.h")]:
        begun: int | None = None
        for number, line in enumerate(path.read_text().splitlines()):
            if re.match(r"[A-Za-z].*\)( const)?( :.*)? \{$", line) and not line.startswith(("namespace", "struct")):
                begun = number
            elif line == "}" and begun is not None:
                assert number - begun + 1 <= LONGEST_FUNCTION, f"{path.name}:{begun + 1}"
                counted, begun = counted + 1, None
    assert counted > 100


def test_file_names_that_mean_different_things_differ() -> None:
    """A name stands once in the package, but for the rooms' own __init__ and the parts of a room that is a list."""
    lists = {"commands", "boards", "eviction", "policies", "rules", "families", "chatformat"}  # one file an entry
    seen: dict[str, Path] = {}
    for folder in ROOMS:
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "__init__.py" and path.parent.name not in lists:
                assert path.name not in seen, f"{path} and {seen[path.name]}"
                seen[path.name] = path


FOLDERS = "docs|runner|schedulers|models|convert|native|bench|tests|examples"
NAMED = re.compile(rf"(?<![\w/.-])((?:{FOLDERS})/[\w/]+\.(?:md|py|h|cpp))")


def test_every_file_that_a_text_names_is_there() -> None:
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    texts += [path for folder in (*ROOMS, "native", "bench", "tests") for path in (ROOT / folder).rglob("*")
              if path.suffix in (".py", ".h", ".cpp")]  # fmt: skip
    missing = {}
    for path in texts:
        if path.name in ("LOG.md", "CHANGELOG.md"):  # they tell of what was
            continue
        for name in NAMED.findall(path.read_text(errors="replace")):
            if not (ROOT / name).exists() and Path(name).stem != "NAME":  # NAME.py: one to be written
                missing[f"{path.relative_to(ROOT)}: {name}"] = name
    assert not missing
