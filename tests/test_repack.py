"""Experts by ggml's repacked kernels: the bits of stock llama.cpp with the same experts repacked.

On x86-64 they are off, for tiled kernels serve many rows there; MOE_EDGE_REPACK=always runs the same code as on ARM.
Stock multiplies repacked experts row by row in a prompt too: where ours multiplies rows together the bits tell. Other
matrices are F32: products that quantize their input to eight bits hide a last bit that differs. AMX is never asked for:
only the buffer type CPU_REPACK is.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import BUDGETS, open_engine
from moe_edge.convert.convert import convert
from moe_edge.models.errors import UnknownName
from moe_edge.models.formats.ggml_types import BY_NAME
from moe_edge.models.store.planes import PLANES
from moe_edge.models.store.store import open_model
from moe_edge.runner.repacking import VARIABLE, is_repacked, repacking
from moe_edge.schedulers.options import PolicyOptions
from random_models import Shape, write_random_model
from reference import repacked_experts, stock_logits
from test_exact import engine_logits, some_tokens

LENGTHS = (1, 6, 100)  # rows of an expert on both sides of MANY_ROWS in native/ffn.h
KINDS = ("Q4_0", "MXFP4", "IQ4_NL", "Q4_K", "Q2_K", "Q8_0")


def repackable(kind: str) -> None:
    """Skip where ggml has no repacked form of this type for the processor."""
    if not is_repacked(BY_NAME[kind].id, 256, 64):
        pytest.skip(f"ggml does not repack {kind} on this processor")


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "always")


def check(path: Path, budget: str, n_ubatch: int = 64, n_threads: int = 2, source: Path | None = None) -> None:
    ours = engine_logits(path, budget, LENGTHS, n_ubatch, n_threads)
    for n, logits in zip(LENGTHS, ours, strict=True):
        stock = stock_logits(source or path, some_tokens(n), n_ubatch, n_threads, n_ctx=640)
        assert np.isfinite(logits).all() and np.array_equal(logits, stock), f"{budget}, {n} tokens"


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("kind", KINDS)
def test_repacked_experts_have_stocks_bits_at_every_budget(tmp_path: Path, kind: str) -> None:
    repackable(kind)
    path = write_random_model(tmp_path / "m.gguf", "qwen3moe", expert_type=kind, dense_type="F32")
    assert "down" in repacked_experts(path)
    for budget in BUDGETS:
        check(path, budget)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("n_ubatch", "n_threads"), [(1, 1), (5, 2), (100, 3)])
def test_which_rows_come_together_changes_no_bit(tmp_path: Path, n_ubatch: int, n_threads: int) -> None:
    repackable("Q4_0")
    path = write_random_model(tmp_path / "m.gguf", "olmoe", expert_type="Q4_0", dense_type="F32")
    check(path, "floor", n_ubatch, n_threads)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("arch", ["gpt-oss", "deepseek2", "deepseek2-fused", "smallthinker"])
def test_architectures_with_biases_shared_experts_fused_and_early_routed_ones(
    random_model: Callable[[str], Path], arch: str
) -> None:
    path = random_model(arch)
    if not repacked_experts(path):
        pytest.skip("ggml repacks none of its experts on this processor")
    check(path, "floor")


@pytest.mark.usefixtures("always")
def test_a_group_larger_than_the_work_area_and_pieces_of_two_kinds(tmp_path: Path) -> None:
    """Both experts get every token; the down projection is not repacked."""
    repackable("Q4_0")
    shape = Shape(n_layer=1, n_embd=1024, n_ff=1536, n_expert=2, n_used=2)
    for name, down in (("all", "Q4_0"), ("up", "F16")):
        path = tmp_path / f"{name}.gguf"
        write_random_model(path, "qwen3moe", shape, expert_type="Q4_0", down_type=down, dense_type="F32")
        assert ("down" in repacked_experts(path)) == (down == "Q4_0")
        (ours,) = engine_logits(path, "resident", (330,), 512, 2)
        assert np.array_equal(ours, stock_logits(path, some_tokens(330), 512, 2, n_ctx=640))


@pytest.mark.usefixtures("always")
def test_packed_experts_are_unpacked_and_then_repacked(tmp_path: Path) -> None:
    repackable("Q4_0")
    source = write_random_model(tmp_path / "m.gguf", "olmoe", expert_type="Q4_0")
    convert(source, tmp_path / "p.gguf", pack="planes")
    assert all(piece.codec == PLANES for piece in open_model(tmp_path / "p.gguf").pieces)
    for budget in ("floor", "resident"):
        check(tmp_path / "p.gguf", budget, source=source)


@pytest.mark.usefixtures("always")
def test_a_lossy_policy_uses_a_repacked_lower_level(tmp_path: Path) -> None:
    repackable("Q4_0")
    source = write_random_model(tmp_path / "m.gguf", "olmoe", Shape(n_used=3), expert_type="Q8_0")
    convert(source, tmp_path / "pair.gguf", low_type="Q4_0", threads=1)
    check(tmp_path / "pair.gguf", "floor", source=source)
    options: dict[str, object] = {"n_ctx": 640, "n_ubatch": 64, "logits_all": True}
    lossy = PolicyOptions("dymoe", retention=0.5)
    with open_engine(tmp_path / "pair.gguf", "floor", **options, policy=lossy) as engine:
        with engine.decoding():
            engine.llama.eval(some_tokens(50))
        assert engine.counters().low_uses > 0


def test_work_space_is_planned_and_only_where_experts_are_repacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, scratch = write_random_model(tmp_path / "m.gguf", "olmoe", expert_type="Q4_0"), {}
    for way in ("never", "always"):
        monkeypatch.setenv(VARIABLE, way)
        repacked = is_repacked(BY_NAME["Q4_0"].id, 256, 64)
        with open_engine(path, "floor", n_ctx=64, n_threads=2) as engine:
            scratch[repacked] = engine.plan.fixed.scratch_bytes
    if True not in scratch:
        pytest.skip("ggml does not repack Q4_0 on this processor")
    assert 2 * 4 * (64 << 10) < scratch[True] - scratch[False] < 2 << 20  # readers' and threads' work space


@pytest.mark.usefixtures("always")
def test_a_state_of_repacked_experts_is_another_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repackable("Q4_0")
    path = write_random_model(tmp_path / "m.gguf", "olmoe", expert_type="Q4_0")
    identities = {}
    for way in ("never", "always"):
        monkeypatch.setenv(VARIABLE, way)
        with open_engine(path, "floor", n_ctx=64, n_threads=1) as engine:
            identities[way] = engine.identity()
    assert "repacked_experts" not in identities["never"]
    assert identities["always"] == {**identities["never"], "repacked_experts": ["Q4_0"]}


def test_what_gains_is_repacked_by_itself_on_arm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    automatic = {name for name in BY_NAME if is_repacked(BY_NAME[name].id, 4096, 64)}
    monkeypatch.setenv(VARIABLE, "always")
    possible = {name for name in BY_NAME if is_repacked(BY_NAME[name].id, 4096, 64)}
    monkeypatch.setenv(VARIABLE, "never")
    assert not any(is_repacked(entry.id, 4096, 64) for entry in BY_NAME.values())
    on_arm = platform.machine() in ("aarch64", "arm64")
    assert automatic == (possible & {"Q4_0", "MXFP4"} if on_arm else set())
    assert not is_repacked(BY_NAME["Q4_0"].id, 4096, 62), "its rows cannot be interleaved"


def test_an_unknown_way_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sometimes")
    with pytest.raises(UnknownName, match=r"MOE_EDGE_REPACK=sometimes.*auto, always, never"):
        repacking()


@pytest.mark.usefixtures("always")
def test_ggml_says_nothing_of_the_matrices_it_repacks(tmp_path: Path) -> None:
    """ggml logs a line for each; its log is llama-cpp-python's, and goes to Python and to stderr."""
    repackable("Q4_0")
    path = write_random_model(tmp_path / "m.gguf", "olmoe", expert_type="Q4_0")
    program = (
        "import sys\n"
        "from moe_edge.runner.engine import Engine\n"
        "from moe_edge.runner.engine_options import EngineOptions\n"
        "from llama_cpp import _logger\n"
        "with Engine(sys.argv[1], EngineOptions(n_ctx=64)) as engine, engine.decoding():\n"
        "    _logger.set_verbose(True)\n"
        "    engine.llama.eval([1, 2, 3])\n"
        "    assert engine.counters().loads > 0\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert "repack tensor" not in done.stderr + done.stdout
