"""Converted checkpoints of every class against transformers, and their GGUFs against llama.cpp's own converter.

The models are random and tiny (tests/reference_hf.py makes them, in an environment of its own: `make reference`). What
is compared: the logits of 40 tokens, at two budgets; key-values; names and shapes of tensors.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from moe_edge.convert.convert import convert
from moe_edge.models.families import CHECKPOINTS
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.sizes import sizes_of
from reference_hf import MODELS, N_TOKENS

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / "build" / "reference" / "bin" / "python"
LLAMA_CPP = ROOT / "build" / "llama.cpp"
MOST_KLD = 1e-4

pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(
        not (PYTHON.exists() and LLAMA_CPP.exists()) and "CI" not in os.environ,
        reason="transformers and llama.cpp's converter are not set up: make reference",
    ),
]

# Keys that a skeleton has on purpose otherwise than a whole model: they size the stubs.
OF_STUBS = ("expert_feed_forward_length", "feed_forward_length", "expert_shared_count")
# Where we say more than llama.cpp's converter, or it says what its own graph does not take. name -> keys
SAID_BY_US = {
    "deepseek2": ("expert_gating_func",), "deepseek2-lite": ("expert_gating_func",),
    "deepseek3": ("expert_gating_func",), "kimi-k2": ("expert_gating_func",), "dots1": ("expert_gating_func",),
    "minimax-m2": ("expert_gating_func",),
    "glm4moelite": ("expert_gating_func", "leading_dense_block_count"),  # it does not know mlp_layer_types
    "granitehybrid": ("attention.head_count_kv",),  # nor that layer_types now say full_attention
    "ernie4_5": ("expert_shared_feed_forward_length",),  # it divides by the number of key heads
}  # fmt: skip
# settings of current transformers that its converter cannot read
NOT_READ_BY_LLAMA_CPP = {"hunyuan", "hunyuan-alpha", "qwen35moe"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reference")
    for what in (["models", made], ["ggufs", made, LLAMA_CPP]):
        done = subprocess.run(
            [PYTHON, ROOT / "tests" / "reference_hf.py", *map(str, what)], capture_output=True, text=True, check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
    return made


@pytest.fixture(scope="module")
def converted(folder: Path) -> Iterator[dict[str, Path]]:
    made = {}
    for name in MODELS:
        made[name] = folder / f"{name}.gguf"
        convert(folder / name, made[name])
    yield made


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def our_logits(model: Path, tokens: list[int], ram_bytes: int | None) -> np.ndarray:
    options = EngineOptions(
        ram_bytes=ram_bytes, n_ctx=256, n_threads=1, logits_all=True, flash_attn=False, n_ubatch=64
    )
    with Engine(model, options) as engine, engine.decoding():
        engine.llama.eval(tokens)
        scores: np.ndarray = engine.llama.scores[:N_TOKENS].copy()
        return scores


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(folder: Path, converted: dict[str, Path], name: str) -> None:
    reference = np.load(folder / name / "logits.npz")
    tokens = reference["ids"].tolist()
    ours = our_logits(converted[name], tokens, None)
    wanted, found = log_probabilities(reference["logits"]), log_probabilities(ours)
    kld = (np.exp(wanted) * (wanted - found)).sum(-1)
    assert kld.mean() < MOST_KLD, f"mean {kld.mean():.1e}, most {kld.max():.1e}"
    options = EngineOptions(n_ctx=256, n_threads=1, logits_all=True, flash_attn=False, n_ubatch=64)
    floor = sizes_of(converted[name], options).plan.floor_bytes
    assert np.array_equal(our_logits(converted[name], tokens, floor), ours)  # and the budget changes no bit


def described(path: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """(key-values of the architecture, shapes of the tensors that are not experts)."""
    reader = gguf.GGUFReader(path)
    keys = {
        name.split(".", 1)[1]: field.contents() for name, field in reader.fields.items()
        if not name.startswith(("GGUF.", "general.", "tokenizer.", "moe_edge."))
    }  # fmt: skip
    shapes = {each.name: [int(n) for n in each.shape] for each in reader.tensors if "_exps." not in each.name}
    return keys, shapes


@pytest.mark.parametrize("name", MODELS)
def test_metadata_is_that_of_llama_cpps_converter(folder: Path, converted: dict[str, Path], name: str) -> None:
    assert (folder / f"{name}.why_not").exists() == (name in NOT_READ_BY_LLAMA_CPP)
    if name in NOT_READ_BY_LLAMA_CPP:
        return
    (keys, shapes), (their_keys, their_shapes) = described(converted[name]), described(folder / f"{name}.ref.gguf")
    apart = {*OF_STUBS, *SAID_BY_US.get(name, ())}
    said = SAID_BY_US.get(name, ())
    assert all(keys.get(key) != their_keys.get(key) for key in said), "says the same now: take it off the list"
    assert set(keys) - set(said) == set(their_keys) - set(said)
    for key in set(keys) - apart:
        theirs = their_keys[key]
        assert keys[key] == (pytest.approx(theirs, rel=1e-6) if isinstance(theirs, float) else theirs), key
    assert {each: [n for n in shape if n != 1] for each, shape in shapes.items()} == {
        each: [n for n in shape if n != 1] for each, shape in their_shapes.items()
    }


def test_every_class_that_is_converted_has_a_row() -> None:
    rows = {kind for kind, _, _ in MODELS.values()}
    whole_pictures = {"Qwen3_5MoeForConditionalGeneration", "Gemma4ForConditionalGeneration"}  # their text part
    assert rows == set(CHECKPOINTS) - whole_pictures
