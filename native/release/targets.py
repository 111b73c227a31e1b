"""What wheels are made for: the machines, their oldest glibc, and the builds of ggml's CPU code that each gets.

Only ggml's CPU library differs from one processor to the next. All other libraries are built once for the architecture.
Ours ask the processor what it has, where they have vectors of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

LLAMA_CPP_PYTHON = "0.3.36"
RUNTIME_NAME = "moe-edge-runtime"
RUNTIME_VERSION = f"{LLAMA_CPP_PYTHON}.1"  # the last number counts our builds of the same llama-cpp-python
GLIBC = "2.28"  # Debian 10, Ubuntu 20.04, RHEL 8 and later


@dataclass(frozen=True)
class Variant:
    """One build of libggml-cpu. name: its folder in the runtime, one of VARIANTS in cpu_choice.py."""

    name: str
    cmake: tuple[str, ...] = ()  # options of llama.cpp
    flags: str = ""  # of the compiler, for the whole build of this library


@dataclass(frozen=True)
class Target:
    """One architecture, as `platform.machine()` calls it, with its variants; the first has the fewest demands."""

    machine: str
    variants: tuple[Variant, ...]

    @property
    def triple(self) -> str:
        return f"{self.machine}-linux-gnu.{GLIBC}"

    @property
    def platform_tag(self) -> str:
        return f"manylinux_{GLIBC.replace('.', '_')}_{self.machine}"


X86_OPTIONS = ("SSE42", "AVX", "F16C", "FMA", "AVX2", "BMI2", "AVX512", "AVX512_VBMI", "AVX512_VNNI")


def _x86(name: str, *on: str) -> Variant:
    return Variant(name, tuple(f"-DGGML_{each}={'ON' if each in on else 'OFF'}" for each in X86_OPTIONS))


_AVX2 = ("SSE42", "AVX", "F16C", "FMA", "AVX2", "BMI2")
TARGETS = {
    "x86_64": Target(
        "x86_64",
        (
            _x86("sse42", "SSE42"),
            _x86("avx2", *_AVX2),
            _x86("avx512", *_AVX2, "AVX512", "AVX512_VBMI", "AVX512_VNNI"),
        ),
    ),
    # Zig takes a processor and features where other compilers take -march=armv8.2-a+dotprod+fp16.
    "aarch64": Target(
        "aarch64",
        (
            Variant("armv8_0"),
            Variant("armv8_2_dotprod", flags="-mcpu=generic+v8_2a+dotprod+fullfp16"),
        ),
    ),
}
