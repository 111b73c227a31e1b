"""Chooses, before llama.cpp is loaded, the build of ggml's CPU code that is the best one for this processor.

Part of moe-edge-runtime, where it is `llama_cpp._cpu_choice` and the first thing that `import llama_cpp` runs.
Libraries find each other by the name inside them (SONAME): once lib/avx2/libggml-cpu.so.0 is loaded, it is what
everybody gets who needs a libggml-cpu.so.0, libllama and the library of moe-edge included.

MOE_EDGE_CPU=NAME takes another build than the best one, for comparisons. LLAMA_CPP_LIB_PATH, of llama-cpp-python, names
a folder of other libraries; then nothing is chosen here.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from pathlib import Path

FORCED = "MOE_EDGE_CPU"
OTHER_LIBRARIES = "LLAMA_CPP_LIB_PATH"
FIRST, AFTER = "libggml-base.so.0", ("libggml-rpc.so.0", "libggml.so.0")  # the CPU's own is loaded between them

_AVX2 = ("sse4_2", "avx", "f16c", "fma", "avx2", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw", "avx512vbmi", "avx512_vnni")
# machine -> build -> the processor's features it uses, by the names that Linux gives them; the best build first
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx512": _AVX512,
        "avx2": _AVX2,
        "sse42": ("sse4_2",),
    },
    "aarch64": {
        "armv8_2_dotprod": ("asimddp", "fphp", "asimdhp"),
        "armv8_0": (),
    },
}
# getauxval's number -> bit -> name: Linux's arch/arm64/include/uapi/asm/hwcap.h
_ARM_BITS = {16: {9: "fphp", 10: "asimdhp", 20: "asimddp"}}

chosen: str | None = None  # the build that was loaded, once one was


def choose(machine: str, features: frozenset[str], forced: str | None = None) -> str:
    """The best build for a machine whose processor has these features.

    forced: a build by its name, whatever the processor has. Raises ImportError with one sentence when there is none.
    """
    builds = VARIANTS.get(machine)
    if builds is None:
        raise ImportError(
            f"moe-edge-runtime has builds for {' and '.join(VARIANTS)}, and this machine is {machine}; "
            "pip uninstall moe-edge-runtime, then pip install llama-cpp-python, which needs a C++ compiler"
        )
    if forced:
        if forced not in builds:
            raise ImportError(f"{FORCED}={forced} is no build of moe-edge-runtime; known: {', '.join(builds)}")
        return forced
    for name, needed in builds.items():
        if features.issuperset(needed):
            return name
    least = list(builds.values())[-1]
    lacks = ", ".join(sorted(set(least) - features))
    raise ImportError(
        f"this processor does not have {lacks}, which every build of moe-edge-runtime for {machine} needs; give a "
        "virtual machine its host's processor type, or pip uninstall moe-edge-runtime and pip install "
        "llama-cpp-python, which compiles for this processor"
    )


def processor_features(machine: str, cpuinfo: str = "/proc/cpuinfo") -> frozenset[str]:
    """What this processor has, by Linux's names; on x86-64 what all processors of /proc/cpuinfo have."""
    if machine == "aarch64":
        return frozenset(_arm_features())
    try:
        text = Path(cpuinfo).read_text(errors="replace")
    except OSError:  # a sandbox without /proc: what every x86-64 processor since 2011 has
        return frozenset({"sse4_2"})
    lines = [line.partition(":")[2].split() for line in text.splitlines() if line.partition(":")[0].strip() == "flags"]
    return frozenset.intersection(*map(frozenset, lines)) if lines else frozenset({"sse4_2"})


def _arm_features() -> list[str]:
    """By getauxval, which knows what all cores have and, under an emulator, what is emulated."""
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return [name for number, bits in _ARM_BITS.items() for bit, name in bits.items() if getauxval(number) >> bit & 1]


def load(folder: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Load ggml's libraries from a folder, with the best CPU build of it. Raises ImportError when none will do."""
    global chosen
    if environ.get(OTHER_LIBRARIES):
        return
    machine = platform.machine()
    name = choose(machine, processor_features(machine), environ.get(FORCED))
    for path in (folder / FIRST, folder / name / "libggml-cpu.so.0", *(folder / each for each in AFTER)):
        try:
            ctypes.CDLL(str(path))
        except OSError as e:
            raise ImportError(f"{path}: cannot be loaded ({e}); pip install --force-reinstall moe-edge-runtime") from e
    chosen = name
