"""Repacked dense weights: stock's bits with the same setting, the budget, and what a state or a proof knows of it.

They are off by default where these tests usually run, and on where `auto` means ARM; tests/arm/on_arm.py is about that.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import BUDGETS, open_engine
from moe_edge.models.errors import CannotRun, UnknownName, UsageError
from moe_edge.models.formats.gguf import read_gguf
from moe_edge.runner import child, loading, prove
from moe_edge.runner.cli import main
from moe_edge.runner.dense_repack import only_repack, processor_repacks, reading_bytes, repacked, repacks
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.llama import load_llama
from moe_edge.runner.loading import Loading
from moe_edge.runner.sizes import sizes_of
from moe_edge.runner.workers.boards_engine import BoardsEngine
from moe_edge.schedulers.budget import format_arg
from moe_edge.schedulers.options import PolicyOptions
from random_models import Shape, write_random_model
from reference import logits_of_context, stock_logits
from test_memory_limit import memory_cgroup

Q4_K, Q8_0 = 12, 8  # ggml's numbers
PROMPT = [int(t) for t in np.random.default_rng(7).integers(0, 255, 45)]
SMALL: dict[str, Any] = {"n_ctx": 128, "n_ubatch": 32, "logits_all": True, "proof": "nothing"}

needs_repacking = pytest.mark.skipif(
    not processor_repacks(Q4_K, 256, 256), reason="this llama.cpp has no repacked form of Q4_K for this processor"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """model(architecture, ...) -> a random model whose dense weights are of a type that is repacked."""
    folder = tmp_path_factory.mktemp("repack")
    made: dict[str, Path] = {}

    def make(arch: str, **options: Any) -> Path:
        name = f"{arch}{sorted(options.items())}"
        if name not in made:
            made[name] = write_random_model(folder / f"{len(made)}.gguf", arch, dense_type="Q4_K", **options)
        return made[name]

    return make


def logits(engine: Engine) -> np.ndarray:
    with engine.decoding():
        return logits_of_context(engine.llama._ctx.ctx, engine.llama._model.model, PROMPT, 32)


# ---- bits ----------------------------------------------------------------------------------------------------


@needs_repacking
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss", "deepseek2"])
def test_the_bits_are_those_of_stock_with_repacked_dense_weights(
    model: Callable[..., Path], arch: str, n_threads: int
) -> None:
    path = model(arch)
    stock = stock_logits(path, PROMPT, 32, n_threads, n_ctx=128, repack="on")
    plain = stock_logits(path, PROMPT, 32, n_threads, n_ctx=128, repack="off")
    assert not np.array_equal(stock, plain)  # or nothing was repacked
    for budget in BUDGETS:
        with open_engine(path, budget, n_threads=n_threads, repack="on", **SMALL) as engine:
            assert np.array_equal(logits(engine), stock), budget
            assert (engine.counters().evictions == 0) == (budget == "resident")


@needs_repacking
def test_experts_that_nothing_repacks_have_the_bits_of_stocks_own_default(model: Callable[..., Path]) -> None:
    path = model("qwen3moe", expert_type="F16")
    stock = stock_logits(path, PROMPT, 32, 1, n_ctx=128, repack="on", repack_experts=True)
    with open_engine(path, "floor", n_threads=1, repack="on", **SMALL) as engine:
        assert np.array_equal(logits(engine), stock)


@needs_repacking
def test_a_repacked_router_is_not_read_by_the_look_ahead(model: Callable[..., Path]) -> None:
    path = model("qwen3moe", router_type="Q4_K")
    stock = stock_logits(path, PROMPT, 32, 1, n_ctx=128, repack="on")
    for repack, known in (("off", 2), ("on", 0)):
        policy = PolicyOptions(lookahead="single")
        with open_engine(path, "middle", n_threads=1, repack=repack, policy=policy, **SMALL) as engine:
            assert engine.native.known_routers == known
            assert np.array_equal(logits(engine), stock) == (repack == "on")


def test_other_kinds_of_extra_buffers_are_hidden_for_a_load_and_there_again_after_it() -> None:
    before = extra_types()
    with only_repack():
        assert extra_types() == [name for name in before if name == "CPU_REPACK"]
    assert extra_types() == before


def extra_types() -> list[str]:
    """What llama.cpp asks ggml for when it may take extra buffer types."""
    folder = Path(llama_cpp.llama_cpp._lib._name).parent
    ggml, base = (ctypes.CDLL(str(next(folder.glob(f"lib{name}.*0*")))) for name in ("ggml", "ggml-base"))
    for lib, name, arguments in (
        (ggml, "ggml_backend_dev_by_type", [ctypes.c_int]),
        (base, "ggml_backend_dev_backend_reg", [ctypes.c_void_p]),
        (base, "ggml_backend_reg_get_proc_address", [ctypes.c_void_p, ctypes.c_char_p]),
    ):
        getattr(lib, name).restype, getattr(lib, name).argtypes = ctypes.c_void_p, arguments
    base.ggml_backend_buft_name.restype, base.ggml_backend_buft_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    device = ggml.ggml_backend_dev_by_type(0)
    registry = base.ggml_backend_dev_backend_reg(device)
    address = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    each = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
    names: list[str] = []
    while each[len(names)]:
        names.append(base.ggml_backend_buft_name(each[len(names)]).decode())
    return names


# ---- memory --------------------------------------------------------------------------------------------------


@needs_repacking
@pytest.mark.parametrize(
    ("arch", "tied"),
    [("olmoe", False), ("qwen2moe", False), ("deepseek2", False), ("gpt-oss", False), ("llama", True),
     ("qwen3moe", True)],
)  # fmt: skip
def test_the_plan_counts_what_llama_cpp_repacks(model: Callable[..., Path], arch: str, tied: bool) -> None:
    path = model(arch, tied=tied)
    options = EngineOptions(n_threads=1, repack="on", **SMALL)
    plain = sizes_of(path, replace(options, repack="off")).plan
    with Engine(path, options) as engine:
        plan = engine.plan
        _, log = engine._loading.llama(engine.native, no_alloc=False)
    (mib,) = re.findall(r"CPU_REPACK model buffer size = +([0-9.]+) MiB", log)
    assert abs(plan.fixed.repacked_bytes - float(mib) * (1 << 20)) < (1 << 20) / 100
    embedding = read_gguf(path).tensors["token_embd.weight"].nbytes
    assert plan.fixed.dense_bytes - plain.fixed.dense_bytes == (embedding if tied else 0)
    assert plan.floor_bytes - plain.floor_bytes == (embedding if tied else 0)
    assert plain.fixed.repacked_bytes == 0
    assert "repacked" in plan.lines()[0] and "repacked" not in plain.lines()[0]


@needs_repacking
@pytest.mark.cgroup
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory cgroups are Linux's")
def test_the_floor_holds_what_is_there_twice_and_the_copies_that_reading_makes(tmp_path: Path) -> None:
    """The least --ram, with its proof, in a group of --ram + 64 MiB: an embedding of 37 MiB that is the output too."""
    shape = Shape(n_layer=2, n_embd=2048, n_ff=256, n_expert=8, n_used=2, n_vocab=32000, head_dim=128)
    path = write_random_model(tmp_path / "m.gguf", "qwen3moe", shape, dense_type="Q4_K", tied=True, tile=True)
    plan = sizes_of(path, EngineOptions(n_threads=1, repack="on", proof="nothing")).plan
    assert plan.fixed.repacked_bytes > 40 << 20 and plan.fixed.dense_bytes > 80 << 20
    ram = format_arg(plan.floor_bytes)
    options = ["--repack", "on", "--ram", ram, "-t", "1", "-p", "The king", "-n", "4", "--temp", "0", "--json"]
    command = [sys.executable, "-m", "moe_edge.runner.start", "generate", str(path), *options]
    with memory_cgroup("repack") as group:
        group.limit((plan.floor_bytes >> 20) + 65 << 20)
        done = group.run(command, env={**os.environ, "MOE_EDGE_CACHE": str(tmp_path / "fresh")})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["generated_tokens"] == 4
    assert "repacked" in done.stderr


@pytest.mark.parametrize(("sizes", "most"), [([], 0), ([7], 14), ([4, 9, 2], 18), ([5, 5, 5], 20), ([1, 9, 9], 27)])
def test_what_reading_takes_is_all_that_was_read_and_one_copy(sizes: list[int], most: int) -> None:
    assert reading_bytes(sizes) == most


def test_tables_stubs_and_vectors_are_not_repacked(model: Callable[..., Path]) -> None:
    skeleton = Loading(model("deepseek2"), EngineOptions(proof="nothing")).skeleton
    asked: list[tuple[int, int, int, int]] = []

    def takes(kind: int, n_cols: int, n_rows: int, n_stacked: int) -> bool:
        asked.append((kind, n_cols, n_rows, n_stacked))
        return kind == Q4_K

    found = repacked(skeleton, takes)
    matrices = [t for name, t in skeleton.tensors.items() if t.type == Q4_K and len(t.shape) == 2]
    table = skeleton.tensors["token_embd.weight"]
    assert found.nbytes == sum(t.nbytes for t in matrices) - table.nbytes
    assert found.twice_bytes == 0 and found.reading_bytes >= found.nbytes
    assert all(kind != Q4_K for kind, *_, n_stacked in asked if n_stacked > 1)  # stubs are asked about, and are F32


def test_a_mapped_skeleton_is_read_instead_where_it_would_be_there_twice(model: Callable[..., Path]) -> None:
    path = model("olmoe")
    for repack, mapped in (("on", False), ("off", True)):
        assert Loading(path, EngineOptions(map_dense=True, repack=repack))._arguments(None)["use_mmap"] is mapped


# ---- who knows of it -----------------------------------------------------------------------------------------


@needs_repacking
def test_a_state_knows_whether_its_weights_were_repacked(model: Callable[..., Path]) -> None:
    path = model("olmoe")
    identities = []
    for repack in ("off", "on"):
        engine = Engine(path, EngineOptions(n_threads=1, repack=repack, **SMALL))
        identities.append(engine.identity())
        engine.close()
    assert identities[1] == {**identities[0], "repacked": True} and "repacked" not in identities[0]


def test_a_proof_is_made_and_remembered_for_each_setting(
    model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = model("llama"), []
    run = child.run

    def seen(*args: Any, **task: Any) -> Any:
        asked.append(task["repack"])
        return run(*args, **task)

    monkeypatch.setattr(child, "run", seen)
    for repack in ("off", "on", "off", "on"):
        Loading(path, EngineOptions(repack=repack)).prove()
    assert asked == [False, True]


def test_a_model_that_fails_only_with_repacked_weights_is_told_the_way_out(
    model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model("granitemoe")

    def fails(*_: Any, repack: bool, **__: Any) -> bool:
        if repack:
            raise CannotRun("it aborts")
        return True

    monkeypatch.setattr(prove, "_prove", fails)
    with pytest.raises(CannotRun, match=r"it aborts; .* --repack off"):
        Loading(path, EngineOptions(repack="on")).prove()
    monkeypatch.setattr(prove, "_runs_plainly", lambda *_: False)
    with pytest.raises(CannotRun, match=r"it aborts$"):
        Loading(path, EngineOptions(repack="on")).prove()


@pytest.mark.parametrize(
    ("machine", "default"), [("x86_64", False), ("AMD64", False), ("aarch64", True), ("arm64", True), ("ARM64", True)]
)
def test_auto_is_on_on_arm_only(machine: str, default: bool) -> None:
    assert repacks("auto", machine) is default
    assert repacks("on", machine) and not repacks("off", machine)


def test_another_word_is_refused() -> None:
    with pytest.raises(UnknownName, match=r"unknown repack 'yes'; known: auto, on, off"):
        repacks("yes")
    assert CliRunner().invoke(main, ["generate", "--repack", "yes", "-p", "x"]).exit_code == 2


def test_the_option_reaches_llama_cpp(model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []

    def seen(*args: Any, repack: bool, **options: Any) -> Any:
        given.append(repack)
        return load_llama(*args, repack=repack, **options)

    monkeypatch.setattr(loading, "load_llama", seen)
    for word, expected in (("on", True), ("off", False)):
        command = ["generate", str(model("olmoe")), "--repack", word, "-p", "x", "-n", "1", "-t", "1"]
        assert CliRunner().invoke(main, command).exit_code == 0
        assert set(given) == {expected}
        given.clear()


def test_several_boards_do_not_repack(model: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="--repack on is of one machine"):
        BoardsEngine(model("olmoe"), EngineOptions(repack="on"), [])
