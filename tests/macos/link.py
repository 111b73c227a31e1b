"""Compile and link native/ for macOS on Apple silicon without a Mac: shows that the branch builds, and runs nothing.

zig (the ziglang package) brings a C++ compiler, a linker and the names that macOS's system libraries export. ggml's
libraries are stood in for by empty ones with the names that this machine's export, so that a name neither ggml nor
macOS has is an error of the linker.

    python tests/macos/link.py FOLDER     needs the ziglang package; under a minute on two idle cores
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NATIVE = Path(__file__).resolve().parents[2] / "native"
TARGET = "aarch64-macos.11.0"  # the first macOS on Apple silicon
LIBRARIES = ("ggml-base", "ggml-cpu", "ggml")
FLAGS = (
    "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Wpedantic", "-Wno-unused-parameter", "-Werror",
    "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-ffp-contract=off", '-DGGML_VERSION_BUILT="macos"',
)  # fmt: skip
EXPORTED = ("_me_register", "_me_model_open", "_me_abi")


def zig(*arguments: str | Path) -> str:
    """What a command of zig prints. Raises SystemExit with what it said when it fails."""
    done = subprocess.run([sys.executable, "-m", "ziglang", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        command = " ".join(map(str, arguments))[:200]
        raise SystemExit(f"zig {command} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def sources() -> list[Path]:
    """The source files that native/CMakeLists.txt names."""
    listed = re.search(r"add_library\(moe_edge SHARED\s+([^)]*)\)", (NATIVE / "CMakeLists.txt").read_text())
    assert listed is not None, "native/CMakeLists.txt names no library moe_edge"
    return [NATIVE / name for name in listed[1].split()]


def llama_cpp() -> Path:
    spec = importlib.util.find_spec("llama_cpp")  # as native/CMakeLists.txt
    if spec is None or spec.origin is None:
        raise SystemExit("llama-cpp-python is not installed for this Python; run make setup")
    return Path(spec.origin).parent


def stand_in(name: str, folder: Path) -> Path:
    """A library of empty functions with the names that this machine's lib{name} exports."""
    library = llama_cpp() / "lib" / f"lib{name}.so"
    listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    names = [word[2] for line in listed.splitlines() if len(word := line.split()) == 3 and word[1] == "T"]
    code, made = folder / f"{name}.c", folder / f"lib{name}.dylib"
    code.write_text("".join(f"void {each}(void) {{}}\n" for each in names if re.fullmatch(r"(ggml|gguf)\w*", each)))
    zig("cc", "-target", TARGET, "-w", "-fno-builtin", "-shared", "-install_name", f"@rpath/lib{name}.0.dylib", code,
        "-o", made)  # fmt: skip
    return made


def compiled(source: Path, folder: Path) -> Path:
    made = folder / f"{source.stem}.o"
    zig("c++", "-target", TARGET, *FLAGS, "-isystem", llama_cpp().parent / "include", "-c", source, "-o", made)
    return made


def main(folder: Path) -> None:
    if importlib.util.find_spec("ziglang") is None:
        raise SystemExit("building for macOS needs the ziglang package; pip install ziglang")
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        libraries = list(pool.map(lambda name: stand_in(name, folder), LIBRARIES))
        objects = list(pool.map(lambda source: compiled(source, folder), sources()))
    made = folder / "libmoe_edge.dylib"
    name = ("-install_name", "@rpath/libmoe_edge.dylib")
    zig("c++", "-target", TARGET, "-shared", *name, *objects, *libraries, "-o", made)
    head = made.read_bytes()
    assert head[:4] == b"\xcf\xfa\xed\xfe" and head[4:8] == b"\x0c\x00\x00\x01", "not a Mach-O file for arm64"
    missing = [name for name in EXPORTED if name.encode() not in head]
    assert not missing, f"{made} exports no {', '.join(missing)}"
    print(f"{made}: {len(objects)} files compiled and linked for {TARGET}; nothing was run")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
