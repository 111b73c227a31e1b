"""The wheel of moe-edge for one target: built with Zig as compiler, then made to need the runtime package.

The source package needs llama-cpp-python, which a compiler builds. The wheel is for machines that moe-edge-runtime has
libraries for, so it asks for that instead.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from compile import run, toolchain, zig_program
from targets import LLAMA_CPP_PYTHON, RUNTIME_NAME, Target

LICENCES = "licenses"


def make_edge_wheel(target: Target, sources: Path, build: Path, dist: Path) -> Path:
    """Build the wheel; its path. sources: of llama-cpp-python. The libraries of the target are compiled already."""
    root, made = Path(__file__).resolve().parents[2], build / target.machine / "edge"
    shutil.rmtree(made, ignore_errors=True)
    arguments = [
        *toolchain(target, build), f"-DGGML_INCLUDE={sources / 'vendor/llama.cpp/ggml/include'}",
        f"-DGGML_LIB={build / target.machine / target.variants[0].name / 'bin'}",
    ]  # fmt: skip
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", made,
         root, "-C", "install.strip=false", "-C", f"build-dir={made / 'cmake'}",
         "-C", f"cmake.args={';'.join(arguments)}"])  # fmt: skip
    (built,) = made.glob("*.whl")
    run([sys.executable, "-m", "wheel", "unpack", "--dest", made, built], quiet=True)
    (tree,) = (path for path in made.iterdir() if (path / "moe_edge").is_dir())
    (info,) = tree.glob("*.dist-info")
    (info / "METADATA").write_text(needing_runtime((info / "METADATA").read_text()))
    (info / "WHEEL").write_text(tagged((info / "WHEEL").read_text(), target.platform_tag))
    (info / LICENCES).mkdir(exist_ok=True)
    shutil.copyfile(zig_program().parent / "lib/libcxx/LICENSE.TXT", info / LICENCES / "LICENSE-libcxx")
    dist.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "wheel", "pack", "--dest-dir", dist, tree], quiet=True)
    return dist / f"{info.stem}-py3-none-{target.platform_tag}.whl"


def needing_runtime(metadata: str) -> str:
    """Core metadata in which the runtime package, any build of it, stands for llama-cpp-python.

    Raises ValueError when llama-cpp-python is not required exactly once, at the release the runtime is made of.
    """
    ours = f"Requires-Dist: {RUNTIME_NAME}=={LLAMA_CPP_PYTHON}.*"
    lines = metadata.splitlines()
    theirs = [i for i, line in enumerate(lines) if line.startswith("Requires-Dist:") and "llama-cpp-python" in line]
    if [lines[i].replace(" ", "") for i in theirs] != [f"Requires-Dist:llama-cpp-python=={LLAMA_CPP_PYTHON}"]:
        found = "; ".join(lines[i] for i in theirs) or "nothing"
        raise ValueError(f"moe-edge requires {found}, but the runtime is made of llama-cpp-python {LLAMA_CPP_PYTHON}")
    lines[theirs[0]] = ours
    return "\n".join(lines) + "\n"


def tagged(wheel: str, platform_tag: str) -> str:
    """The file WHEEL with one tag: any Python 3, no ABI (the library is loaded by ctypes), this platform."""
    kept = [line for line in wheel.splitlines() if line.strip() and not line.startswith("Tag:")]
    return "\n".join([*kept, f"Tag: py3-none-{platform_tag}"]) + "\n"
