"""Instructions the processor has and the build of llama.cpp does not use, or the other way round."""

from __future__ import annotations

from collections.abc import Iterator

from moe_edge.runner.measure.boards.finding import COSTS, NOTE, OK, UNKNOWN, Check, Finding
from moe_edge.runner.measure.boards.machine import Machine

# (the kernel's word, the word of llama_print_system_info), those that matter most first.
ARM = (("asimddp", "DOTPROD"), ("asimdhp", "FP16_VA"), ("i8mm", "MATMUL_INT8"), ("sve", "SVE"))
X86 = (
    ("avx2", "AVX2"), ("fma", "FMA"), ("f16c", "F16C"), ("avx", "AVX"), ("avx512f", "AVX512"),
    ("avx512_vnni", "AVX512_VNNI"), ("avx_vnni", "AVX_VNNI"), ("bmi2", "BMI2"),
)  # fmt: skip
MAC = (
    ("hw.optional.arm.FEAT_DotProd", "DOTPROD"), ("hw.optional.arm.FEAT_FP16", "FP16_VA"),
    ("hw.optional.arm.FEAT_I8MM", "MATMUL_INT8"),
)  # fmt: skip
BETWEEN = ("AVX512_VNNI", "AVX_VNNI", "BMI2", "SVE")  # useful, but no product is slow without them
WHAT = {
    "DOTPROD": "a product of 8-bit weights takes several instructions where one would do",
    "FP16_VA": "half-precision numbers are widened before they are added",
    "MATMUL_INT8": "prompts are multiplied row by row, without the matrix instructions",
    "AVX2": "products use half as wide registers",
    "FMA": "a multiplication and its sum are two instructions",
    "F16C": "half-precision numbers are converted one by one",
    "AVX": "products use half as wide registers",
    "AVX512": "products use half as wide registers",
}
BUILD = "pip install --force-reinstall --no-cache-dir --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36"


def cpu_words(machine: Machine) -> frozenset[str] | None:
    """The features every core has, in ggml's words; None when the machine does not say."""
    if machine.is_mac:
        said = [(machine.sysctl(name), word) for name, word in MAC]
        if all(value is None for value, _ in said):
            return None
        return frozenset(word for value, word in said if value == "1")
    cores = []
    for line in (machine.text("proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("Features", "flags"):
            cores.append(frozenset(value.split()))
    if not cores:
        return None
    common = frozenset.intersection(*cores)
    return frozenset(word for flag, word in (*ARM, *X86) if flag in common)


def _run(machine: Machine) -> Iterator[Finding]:
    cpu, build = cpu_words(machine), machine.build_features
    if cpu is None or build is None:
        unread, unloaded = "the processor's features cannot be read", "llama.cpp does not load, so its build is unknown"
        yield Finding("cpu features", UNKNOWN, unread if cpu is None else unloaded)
        return
    known = [word for _, word in (*ARM, *X86)]
    beyond = [word for word in known if word in build and word not in cpu]
    unused = [word for word in known if word in cpu and word not in build]
    if beyond and not machine.is_mac:  # macOS does not list what every Mac has
        yield Finding(
            "cpu features", COSTS, f"llama.cpp was built with {', '.join(beyond)}, which this processor lacks",
            "the program dies of an illegal instruction at the first product that uses them", f"build it here: {BUILD}",
        )  # fmt: skip
    if unused:
        costly = [word for word in unused if word not in BETWEEN]
        cost = "; ".join(WHAT[word] for word in costly) or "none of them makes a product slow by being unused"
        yield Finding(
            "cpu features", COSTS if costly else NOTE,
            f"the processor has {', '.join(unused)}, which this build of llama.cpp does not use",
            cost, f"build it for this processor: {BUILD}",
        )  # fmt: skip
    if not beyond and not unused:
        words = ", ".join(word for word in known if word in cpu) or "none that ggml asks for"
        yield Finding("cpu features", OK, f"{words}: all used")


CHECK = Check("cpu features", 20, _run)
