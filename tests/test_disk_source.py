"""The reader threads, and the model's loading on top of them, in C++ alone: small cases, then chance, under sanitizers.

The programs are tests/native/*_stress.cpp, compiled here from the sources of this checkout. A failure names the line;
the same seed need not fail twice, because the threads do not run alike.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = next((c for c in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if shutil.which(c)), None)
# -O0: the sanitizers took three times as long to compile with -O1, and the time goes to reading anyway.
FLAGS = ["-std=c++17", "-O0", "-g", "-D_GLIBCXX_ASSERTIONS", "-pthread"]
SANITIZERS = {
    "plain": [],
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
SOURCES = {
    "reader": ["tests/native/disk_source_stress.cpp", "native/disk_source.cpp", "native/pages.cpp"],
    "model": [
        "tests/native/model_stress.cpp", "native/model.cpp", "native/codec.cpp", "native/exponents.cpp",
        "native/disk_source.cpp",
        "native/arena.cpp", "native/pages.cpp", "native/parts.cpp", "native/unpackers.cpp",
    ],
}
PROGRAMS = [("reader", "plain"), ("reader", "thread"), ("reader", "address"), ("model", "thread"), ("model", "address")]
SECONDS = 0.7  # by chance, after the small cases

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: none of c++, g++ and clang++ is on the PATH")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, env=env)


def ggml_headers() -> Path:
    spec = importlib.util.find_spec("llama_cpp")  # as native/CMakeLists.txt
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parents[1] / "include"


def compile_and_run(folder: Path, name: str, sanitizer: str) -> subprocess.CompletedProcess[str]:
    include = ["-I", ROOT / "native", "-isystem", ggml_headers()]
    sources = [ROOT / s for s in SOURCES[name]]
    program, files = folder / f"{name}-{sanitizer}", folder / f"{name}-{sanitizer}-files"
    files.mkdir()
    done = run(str(COMPILER), *FLAGS, *SANITIZERS[sanitizer], *include, *sources, "-o", program)  # type: ignore[arg-type]
    return run(program, files, "1", str(SECONDS)) if done.returncode == 0 else done


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[tuple[str, str], Future]]]:  # type: ignore[type-arg]
    """The folder of the programs, and how each ends; all are at work at once."""
    folder = tmp_path_factory.mktemp("stress")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield folder, {p: pool.submit(compile_and_run, folder, *p) for p in PROGRAMS}


def skip_without_runtime(folder: Path, sanitizer: str) -> None:
    """Skip when not even an empty program can be compiled and run so."""
    source, program = folder / f"empty-{sanitizer}.cpp", folder / f"empty-{sanitizer}"
    source.write_text("int main() { return 0; }\n")
    for command in ([str(COMPILER), *FLAGS, *SANITIZERS[sanitizer], source, "-o", program], [program]):
        done = run(*command)
        if done.returncode != 0:
            said = " ".join((done.stderr.strip() or f"exit {done.returncode}").split())
            pytest.skip(f"{COMPILER} has no working {' '.join(SANITIZERS[sanitizer])} here: {said[:300]}")


def said_by_check(folder: Path, sources: Sequence[str], ggml: Sequence[str], sanitizer: str, level: str) -> list[str]:
    """Lines of a program that compares ours with ggml's, of these sources and libraries; it must find no difference."""
    libraries = ggml_headers().parent / "llama_cpp" / "lib"
    shared = [next(libraries.glob(f"lib{name}.so.0"), None) for name in ggml]
    if not all(shared):
        pytest.skip(f"no shared libraries of ggml in {libraries}")
    flags = [*FLAGS, *SANITIZERS[sanitizer], level, "-ffp-contract=off"]
    include = ["-I", ROOT / "native", "-isystem", ggml_headers()]
    program, rpath = folder / "check", f"-Wl,-rpath,{libraries}"
    files = [ROOT / each for each in sources]
    done = run(str(COMPILER), *flags, *include, *files, *shared, rpath, "-o", program)  # type: ignore[arg-type]
    if done.returncode != 0:
        skip_without_runtime(folder, sanitizer)
    assert done.returncode == 0, done.stderr
    done = run(program)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("name", "sanitizer"), PROGRAMS)
def test_every_read_ends_once_and_right_whoever_promotes_and_cancels(
    running: tuple[Path, dict[tuple[str, str], Future]], name: str, sanitizer: str  # type: ignore[type-arg]
) -> None:
    if name == "model" and not (ggml_headers() / "ggml.h").exists():
        pytest.skip(f"no ggml.h in {ggml_headers()}")
    folder, ends = running
    done = ends[name, sanitizer].result()
    if done.returncode != 0:
        skip_without_runtime(folder, sanitizer)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " rounds by chance, " in done.stdout
