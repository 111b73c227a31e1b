"""Two packages bring llama.cpp, and one of them has to be there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from moe_edge.models.errors import WrongLibrary
from moe_edge.runner.llama_package import COMPILED, READY, installed_packages, llama_build, only_package


def test_either_package_will_do() -> None:
    assert only_package({COMPILED: "0.3.36"}) == (COMPILED, "0.3.36")
    assert only_package({READY: "0.3.36.1"}) == (READY, "0.3.36.1")


def test_none_names_both_ways_to_get_one() -> None:
    both = r"no package .*'llama-cpp-python==0\.3\.36'.*'moe-edge-runtime==0\.3\.36\.\*'"
    with pytest.raises(WrongLibrary, match=both):
        only_package({})


def test_both_are_refused_with_the_way_out() -> None:
    with pytest.raises(WrongLibrary, match=r"python 0\.3\.35 and moe-edge-runtime 0\.3\.36\.1 .*uninstall -y"):
        only_package({COMPILED: "0.3.35", READY: "0.3.36.1"})


def test_what_is_installed_here_is_named_with_its_build() -> None:
    ((name, version),) = installed_packages().items()
    assert llama_build().startswith(f"{name} {version}")


@pytest.mark.parametrize("command", [["chat"], ["doctor"]])
def test_a_llama_cpp_that_cannot_be_loaded_is_one_sentence(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text("raise RuntimeError('no libgomp.so.1 here')")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path), "MOE_EDGE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "moe_edge.runner.start", *command],
        input="hello", env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert "cannot be loaded: no libgomp.so.1 here" in said
    assert "fault of moe-edge" not in said and "Traceback" not in said
    assert done.returncode == (0 if command == ["doctor"] else 1), said
