"""What makes the wheels: the choice of a CPU build, and what the wheels say of themselves. Nothing is compiled here."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import pytest
from moe_edge.runner.llama_package import WORKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "native" / "release"))

import cpu_choice
from cpu_choice import VARIANTS, choose, processor_features
from edge_wheel import needing_runtime, tagged
from runtime_wheel import leading_comment, metadata
from targets import LLAMA_CPP_PYTHON, RUNTIME_NAME, RUNTIME_VERSION, TARGETS

ROOT = Path(__file__).resolve().parents[1]
HASWELL = frozenset("sse4_2 avx f16c fma avx2 bmi2 lm".split())
SKYLAKE_X = HASWELL | frozenset("avx512f avx512cd avx512vl avx512dq avx512bw".split())
ICE_LAKE = SKYLAKE_X | {"avx512vbmi", "avx512_vnni"}
CORTEX_A76 = frozenset({"fphp", "asimdhp", "asimddp"})


@pytest.mark.parametrize(
    "machine, features, build",
    [
        ("x86_64", frozenset({"sse4_2", "lm"}), "sse42"),
        ("x86_64", HASWELL - {"fma"}, "sse42"),
        ("x86_64", HASWELL, "avx2"),
        ("x86_64", HASWELL | {"avx_vnni"}, "avx2"),
        ("x86_64", SKYLAKE_X, "avx2"),
        ("x86_64", ICE_LAKE - {"avx512bw"}, "avx2"),
        ("x86_64", ICE_LAKE | {"avx_vnni"}, "avx512"),
        ("aarch64", frozenset(), "armv8_0"),
        ("aarch64", CORTEX_A76, "armv8_2_dotprod"),
        ("aarch64", CORTEX_A76 - {"asimdhp"}, "armv8_0"),
    ],
)
def test_the_best_build_that_the_processor_can_run_is_chosen(
    machine: str, features: frozenset[str], build: str
) -> None:
    assert choose(machine, features) == build


def test_a_processor_too_old_for_every_build_is_told_what_it_lacks() -> None:
    with pytest.raises(ImportError, match=r"does not have sse4_2, .*virtual machine .*llama-cpp-python"):
        choose("x86_64", frozenset({"lm"}))
    with pytest.raises(ImportError, match=r"builds for x86_64 and aarch64, and this machine is riscv64"):
        choose("riscv64", frozenset())


def test_a_build_can_be_forced_by_its_name() -> None:
    assert choose("x86_64", ICE_LAKE, "sse42") == "sse42"
    with pytest.raises(ImportError, match=r"MOE_EDGE_CPU=avx3 is no build .* known: avx512, avx2, sse42"):
        choose("x86_64", ICE_LAKE, "avx3")


def test_features_are_those_of_every_processor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu sse4_2 avx2\n\nprocessor\t: 1\nflags\t\t: fpu sse4_2\n")
    assert processor_features("x86_64", str(cpuinfo)) == {"fpu", "sse4_2"}
    assert choose("x86_64", processor_features("x86_64", str(tmp_path / "none"))) == "sse42"


def test_the_builds_that_are_compiled_are_those_that_can_be_chosen() -> None:
    for name, target in TARGETS.items():
        assert {variant.name for variant in target.variants} == set(VARIANTS[name])
        assert list(VARIANTS[name])[-1] == target.variants[0].name  # the one with the fewest demands
        needed = [set(features) for features in VARIANTS[name].values()]
        assert all(needed[-1] <= each for each in needed)
        assert not [pair for pair in itertools.pairwise(needed) if pair[0] < pair[1]]


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu_choice, "chosen", None)
    cpu_choice.load(tmp_path, {"LLAMA_CPP_LIB_PATH": "/opt/llama"})
    assert cpu_choice.chosen is None


def test_a_runtime_with_a_missing_library_says_which(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"libggml-base\.so\.0: cannot be loaded .*--force-reinstall|this machine is"):
        cpu_choice.load(tmp_path, {})


def test_the_runtime_is_of_the_release_that_the_source_package_needs() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert project.count(f'"llama-cpp-python=={LLAMA_CPP_PYTHON}"') == 2
    assert WORKING == {"llama-cpp-python": LLAMA_CPP_PYTHON, RUNTIME_NAME: f"{LLAMA_CPP_PYTHON}.*"}
    assert re.fullmatch(rf"{re.escape(LLAMA_CPP_PYTHON)}\.[0-9]+", RUNTIME_VERSION)
    assert f"llama-cpp-python=={LLAMA_CPP_PYTHON}" in (ROOT / "Makefile").read_text()


def test_the_wheel_needs_the_runtime_in_place_of_the_source_package() -> None:
    before = f"Name: moe-edge\nRequires-Dist: llama-cpp-python=={LLAMA_CPP_PYTHON}\nRequires-Dist: numpy>=1.24\n\n"
    after = needing_runtime(before)
    assert f"Requires-Dist: moe-edge-runtime=={LLAMA_CPP_PYTHON}.*\nRequires-Dist: numpy>=1.24\n" in after
    assert "llama-cpp-python" not in after
    for other in (before.replace(LLAMA_CPP_PYTHON, "0.3.35"), "Name: moe-edge\n"):
        with pytest.raises(ValueError, match=rf"runtime is made of llama-cpp-python {re.escape(LLAMA_CPP_PYTHON)}"):
            needing_runtime(other)


def test_a_wheel_has_one_tag() -> None:
    wheel = "Wheel-Version: 1.0\nTag: py3-none-linux_x86_64\nTag: py3-none-any\n"
    assert tagged(wheel, "manylinux_2_28_x86_64") == "Wheel-Version: 1.0\nTag: py3-none-manylinux_2_28_x86_64\n"


def test_the_runtime_keeps_the_requirements_of_llama_cpp_python() -> None:
    theirs = "Name: llama_cpp_python\nRequires-Dist: numpy>=1.20.0\nRequires-Dist: fastapi; extra == 'server'\n"
    theirs = theirs.replace("'", '"')
    text = metadata(theirs, ["LICENSE-llama.cpp"])
    assert "Name: moe-edge-runtime\n" in text and "Requires-Dist: numpy>=1.20.0\n" in text
    assert "fastapi" not in text and "License-File: LICENSE-llama.cpp\n" in text


def test_a_licence_is_the_first_comment_of_a_file() -> None:
    assert leading_comment("// Copyright 2024 A\n//\n// text\n\n// other\n") == "Copyright 2024 A\n\ntext\n"
    with pytest.raises(ValueError, match="copyright"):
        leading_comment("#include <x>\n")
