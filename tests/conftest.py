"""Shared fixtures: a private cache, tiny random models made once, and engines at named budgets."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint, write_stock
from moe_edge.convert.convert import convert
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.sizes import NO_LIMIT
from random_models import Shape, write_random_model

HIGH_TYPE, LOW_TYPE = "Q8_0", "Q4_0"  # of models with two levels
BUDGETS = ("floor", "middle", "resident")


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Skeletons of stock GGUFs go to a folder of the test run, for this process and its children."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("MOE_EDGE_CACHE")
    os.environ["MOE_EDGE_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["MOE_EDGE_CACHE"]
    else:
        os.environ["MOE_EDGE_CACHE"] = before


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """random_model(architecture) -> a tiny random GGUF of it, made once."""
    folder = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def make(arch: str) -> Path:
        if arch not in made:
            made[arch] = write_random_model(folder / f"{arch}.gguf", arch)
        return made[arch]

    return make


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OLMoE checkpoint in Hugging Face form."""
    return write_checkpoint(tmp_path_factory.mktemp("olmoe") / "tiny-olmoe")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny stock GGUF, Q8_0."""
    return write_stock(tmp_path_factory.mktemp("stock") / "stock.gguf", kind="Q8_0")


def budget_bytes(path: Path, name: str, options: EngineOptions) -> int:
    """A budget by name for this model and these options: the floor, all resident, or half way."""
    from dataclasses import replace

    engine = Engine(path, replace(options, ram_bytes=NO_LIMIT))
    plan = engine.plan
    engine.close()
    return {
        "floor": plan.floor_bytes,
        "middle": (plan.floor_bytes + plan.resident_bytes) // 2,
        "resident": plan.resident_bytes,
    }[name]


def open_engine(path: Path, budget: str, **options: object) -> Engine:
    """An engine, not loaded yet, at a named budget."""
    from dataclasses import replace

    o = EngineOptions(**options)  # type: ignore[arg-type]
    return Engine(path, replace(o, ram_bytes=budget_bytes(path, budget, o)))


@pytest.fixture
def llama_without_repacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Llama` has no argument for use_extra_bufts, so the default it starts from changes."""
    import llama_cpp

    default_params = llama_cpp.llama_cpp.llama_model_default_params

    def params() -> Any:
        result = default_params()
        result.use_extra_bufts = False
        return result

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", params)


@pytest.fixture(scope="session", autouse=True)
def signals_as_a_terminal_gives_them() -> None:
    """A shell's `&` or nohup may have these ignored, which the programs under test would inherit and respect."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """sources(architecture) -> a random stock GGUF with experts of HIGH_TYPE, 3 used of 8."""
    folder = tmp_path_factory.mktemp("sources")

    def make(arch: str) -> Path:
        path = folder / f"{arch}.gguf"
        if not path.exists():
            write_random_model(path, arch, Shape(n_used=3), expert_type=HIGH_TYPE)
        return path

    return make


@pytest.fixture(scope="module")
def stores(sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """stores(architecture) -> that model with two levels."""
    folder = tmp_path_factory.mktemp("stores")

    def make(arch: str) -> Path:
        path = folder / f"{arch}.gguf"
        if not path.exists():
            convert(sources(arch), path, low_type=LOW_TYPE, threads=1)
        return path

    return make
