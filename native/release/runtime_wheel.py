"""The wheel of moe-edge-runtime: llama-cpp-python's Python files, as they are, with libraries of our own build.

Three things differ from llama-cpp-python's own wheel: `llama_cpp/__init__.py` begins by choosing the CPU build
(cpu_choice.py); `_ggml.py`, which nothing imports and which looks for a library under a name we do not install, is left
out; and each library is there once.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from compile import compile_libraries, run, zig_program
from targets import RUNTIME_NAME, RUNTIME_VERSION, Target

LEFT_OUT = ("_ggml.py", "__pycache__", "lib")
CHOICE = '''\
# Added by moe-edge-runtime; the rest of this file is llama-cpp-python's.
import pathlib as _pathlib

from . import _cpu_choice

_cpu_choice.load(_pathlib.Path(__file__).resolve().parent / "lib")

'''
SUMMARY = "llama-cpp-python with prebuilt llama.cpp libraries for several processors, for moe-edge"
ABOUT = """\
# moe-edge-runtime

llama-cpp-python's Python files and llama.cpp's libraries, compiled for several kinds of processor; the best one is
chosen when `llama_cpp` is imported. It takes the place of llama-cpp-python: install one of the two, not both.

llama-cpp-python is by Andrei Betlen and its contributors, llama.cpp and ggml by the ggml authors, and their matrix
products for llamafile by the Mozilla Foundation, all under the MIT licence. The C++ library linked in is LLVM's libc++
(Apache 2.0 with LLVM exceptions), as Zig brings it.
"""


def make_runtime_wheel(target: Target, sources: Path, build: Path, dist: Path) -> Path:
    """Compile what is not compiled yet, and pack the wheel; its path. sources: of llama-cpp-python."""
    tree = build / target.machine / "runtime"
    shutil.rmtree(tree, ignore_errors=True)
    package = tree / "llama_cpp"
    shutil.copytree(sources / "llama_cpp", package, ignore=shutil.ignore_patterns(*LEFT_OUT))
    start = package / "__init__.py"
    start.write_text(CHOICE + start.read_text())
    shutil.copyfile(Path(__file__).with_name("cpu_choice.py"), package / "_cpu_choice.py")
    compile_libraries(target, sources, build, package / "lib")
    info = tree / f"{RUNTIME_NAME.replace('-', '_')}-{RUNTIME_VERSION}.dist-info"
    _write_licences(sources, info / "licenses")
    (info / "METADATA").write_text(metadata((sources / "PKG-INFO").read_text(), sorted(_names(info / "licenses"))))
    (info / "WHEEL").write_text(
        "Wheel-Version: 1.0\nGenerator: moe-edge release\nRoot-Is-Purelib: false\n"
        f"Tag: py3-none-{target.platform_tag}\n"
    )
    dist.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "wheel", "pack", "--dest-dir", dist, tree], quiet=True)
    return dist / f"{info.stem}-py3-none-{target.platform_tag}.whl"


def metadata(theirs: str, licences: list[str]) -> str:
    """The core metadata, with the requirements of llama-cpp-python's own (PKG-INFO), its extras left out."""
    required = [line for line in theirs.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    lines = [
        "Metadata-Version: 2.4", f"Name: {RUNTIME_NAME}", f"Version: {RUNTIME_VERSION}", f"Summary: {SUMMARY}",
        "License-Expression: MIT AND Apache-2.0 WITH LLVM-exception", *(f"License-File: {name}" for name in licences),
        "Requires-Python: >=3.10", *required, "Description-Content-Type: text/markdown",
    ]  # fmt: skip
    return "\n".join(lines) + "\n\n" + ABOUT


def _names(folder: Path) -> Iterator[str]:
    return (path.name for path in folder.iterdir())


def _write_licences(sources: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    llama_cpp = sources / "vendor" / "llama.cpp"
    shutil.copyfile(sources / "LICENSE.md", folder / "LICENSE-llama-cpp-python")
    shutil.copyfile(llama_cpp / "LICENSE", folder / "LICENSE-llama.cpp")
    shutil.copyfile(zig_program().parent / "lib" / "libcxx" / "LICENSE.TXT", folder / "LICENSE-libcxx")
    shutil.copyfile(Path(__file__).resolve().parents[2] / "LICENSE", folder / "LICENSE-moe-edge")
    products = (llama_cpp / "ggml/src/ggml-cpu/llamafile/sgemm.cpp").read_text()
    (folder / "LICENSE-llamafile-sgemm").write_text(leading_comment(products))


def leading_comment(source: str) -> str:
    """The text of the first // comment of a C++ file, which holds its licence. Raises ValueError without one."""
    lines: list[str] = []
    for line in source.splitlines():
        if not line.startswith("//"):
            break
        lines.append(line[2:].removeprefix(" "))
    if not any("Copyright" in line for line in lines):
        raise ValueError("the file does not begin with a comment that has a copyright line")
    return "\n".join(lines) + "\n"
