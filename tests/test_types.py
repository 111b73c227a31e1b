"""The table of tensor types against ggml itself, and models with a type that no kernel computes with."""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import llama_cpp
import pytest
from moe_edge.convert.checkpoints import open_source
from moe_edge.convert.convert import convert
from moe_edge.models.errors import BadFile
from moe_edge.models.formats.ggml_types import TYPES, WITHOUT_PRODUCT, check_product, type_name
from moe_edge.models.formats.gguf import read_gguf
from moe_edge.models.store.store import open_model
from random_models import Shape, write_random_model

SMALL = Shape(n_layer=2, n_embd=256, n_ff=256, n_expert=4, n_used=2)


class CpuTraits(ctypes.Structure):
    _fields_ = (
        ("from_float", ctypes.c_void_p), ("vec_dot", ctypes.c_void_p), ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )  # fmt: skip


def ggml(name: str) -> ctypes.CDLL:
    if sys.platform == "linux":
        return ctypes.CDLL(f"lib{name}.so.0")  # by SONAME: what llama_cpp has loaded
    folder = Path(llama_cpp.__file__).parent / "lib"
    return ctypes.CDLL(str(next(p for p in sorted(folder.iterdir()) if p.name.startswith(f"lib{name}."))))


@pytest.fixture(scope="module")
def types_of_ggml() -> Iterator[dict[int, tuple[str, int, int, bool]]]:
    """Type id -> name, block, bytes of a block, and whether weights of it can be multiplied by on a CPU."""
    base, cpu = ggml("ggml-base"), ggml("ggml-cpu")
    base.ggml_type_name.restype = ctypes.c_char_p
    base.ggml_blck_size.restype = ctypes.c_int64
    base.ggml_type_size.restype = ctypes.c_size_t
    cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(CpuTraits)
    found = {}
    header = (Path(llama_cpp.__file__).parents[1] / "include" / "ggml.h").read_text()
    for type_id in range(int(re.findall(r"GGML_TYPE_COUNT\s*=\s*(\d+)", header)[0])):
        if base.ggml_type_size(type_id) == 0 or base.ggml_blck_size(type_id) == 0:
            continue  # removed long ago
        traits = cpu.ggml_get_type_traits_cpu(type_id)[0]
        works = bool(traits.vec_dot) and bool(cpu.ggml_get_type_traits_cpu(traits.vec_dot_type)[0].from_float)
        name = base.ggml_type_name(type_id).decode().upper()
        found[type_id] = (name, base.ggml_blck_size(type_id), base.ggml_type_size(type_id), works)
    yield found


def test_the_table_is_ggmls_own(types_of_ggml: dict[int, tuple[str, int, int, bool]]) -> None:
    ours = {t.id: (t.name, t.block, t.block_bytes, t.id not in WITHOUT_PRODUCT) for t in TYPES.values()}
    assert ours == types_of_ggml


def retyped(source: Path, target: Path, name: str, type_id: int) -> Path:
    """A copy of a GGUF whose tensor `name` claims another type; what its bytes mean does not matter."""
    data = bytearray(source.read_bytes())
    entry = read_gguf(source).tensors[name]
    at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + 4 + 8 * len(entry.shape)
    struct.pack_into("<I", data, at, type_id)
    target.write_bytes(data)
    return target


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "moe_edge.runner.start", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """F64 everywhere would be the largest: bytes enough for any type."""
    folder = tmp_path_factory.mktemp("types")
    path = write_random_model(folder / "m.gguf", "olmoe", SMALL, expert_type="F32", dense_type="F32")
    path.write_bytes(path.read_bytes() + bytes(1 << 22))
    return path


@pytest.mark.parametrize("type_id", sorted(WITHOUT_PRODUCT), ids=type_name)
@pytest.mark.parametrize("name", ["blk.1.ffn_down_exps.weight", "blk.0.attn_q.weight", "output_norm.weight"])
def test_a_type_without_a_kernel_is_named_when_a_model_is_opened(
    model: Path, tmp_path: Path, name: str, type_id: int
) -> None:
    bad = retyped(model, tmp_path / "bad.gguf", name, type_id)
    for opening in (open_model, open_source):
        with pytest.raises(BadFile, match=rf"bad\.gguf: tensor '{name}' is of type {type_name(type_id)}"):
            opening(bad)


@pytest.mark.parametrize("words", [("show",), ("generate", "-p", "a"), ("convert", "-o")], ids=lambda words: words[0])
def test_every_command_says_it_in_one_sentence(model: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    name = "blk.1.ffn_down_exps.weight"
    bad = retyped(model, tmp_path / "bad.gguf", name, 9)
    run = command(words[0], bad, *words[1:], *([tmp_path / "out.gguf"] if words[-1] == "-o" else []))
    assert run.returncode == 1, run.stderr
    assert f"bad.gguf: tensor '{name}' is of type Q8_1" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out.gguf").exists()


def test_a_table_of_indices_may_hold_integers() -> None:
    check_product("blk.2.ffn_gate_tid2eid.weight", 26, "m.gguf")
    with pytest.raises(BadFile, match="I32"):
        check_product("blk.2.ffn_gate_inp.weight", 26, "m.gguf")


@pytest.mark.parametrize("part", ["skeleton", "store"])
def test_a_converted_model_is_checked_too(model: Path, tmp_path: Path, part: str) -> None:
    convert(model, tmp_path / "pair.gguf")
    store = tmp_path / "pair.experts.gguf"
    store.write_bytes(store.read_bytes() + bytes(1 << 22))
    file = {"skeleton": tmp_path / "pair.gguf", "store": store}[part]
    name = {"skeleton": "blk.0.attn_q.weight", "store": "blk.1.ffn_up_exps.2.weight"}[part]
    retyped(file, file, name, 24)
    run = command("show", tmp_path / "pair.gguf")
    assert run.returncode == 1
    assert f"{file.name}: tensor '{name}' is of type I8" in run.stderr


@pytest.fixture
def engine_logits() -> Callable[[Path], object]:
    from test_expert_scales import check

    return lambda path: check(path, path, "floor", (1, 40), 32)


@pytest.mark.parametrize("expert_type", ["Q1_0", "TQ2_0", "NVFP4", "IQ1_M"])
def test_a_rare_type_with_a_kernel_gives_stock_bits(
    tmp_path: Path, expert_type: str, engine_logits: Callable[[Path], object]
) -> None:
    engine_logits(write_random_model(tmp_path / "m.gguf", "olmoe", SMALL, expert_type=expert_type))
