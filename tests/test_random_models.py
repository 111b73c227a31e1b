"""The random models are fit to test with: stock llama.cpp runs them, and their numbers are healthy."""

from __future__ import annotations

from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray
from random_models import ARCHITECTURES, Shape, write_big_model, write_random_model
from random_numbers import fitting_type, quantize
from random_vocabulary import ID_OF_EOS
from reference import logits_of_context, stock_context, stock_logits, stock_model

N_PROMPT = 40
MAX_TINY_BYTES = 6_000_000


def prompt(n_vocab: int = 512) -> list[int]:
    tokens: list[int] = np.random.default_rng(7).integers(0, n_vocab, N_PROMPT).tolist()
    return tokens


def check_healthy(logits: NDArray[np.float32], n_vocab: int = 512) -> None:
    assert logits.shape == (N_PROMPT, n_vocab)
    assert np.isfinite(logits).all()
    assert logits.std(axis=1).min() > 0.5
    assert np.abs(logits).max() < 100
    assert len(set(logits.argmax(axis=1).tolist())) > N_PROMPT // 4


def expert_tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors if "_exps.weight" in t.name}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_stock_llama_cpp_runs_each_architecture(arch: str, tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "tiny.gguf", arch)
    assert path.stat().st_size < MAX_TINY_BYTES
    check_healthy(stock_logits(path, prompt(), n_ubatch=16, n_ctx=256))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_experts_need_not_be_a_multiple_of_256_wide(arch: str, tmp_path: Path) -> None:
    shape = Shape(n_embd=512, n_ff=128, n_expert=32, n_used=4, n_vocab=300)
    path = write_random_model(tmp_path / "tiny.gguf", arch, shape, expert_type="Q4_K", vocab=False)
    assert expert_tensors(path)["blk.1.ffn_down_exps.weight"].tensor_type.name == "Q8_0"
    check_healthy(stock_logits(path, prompt(300), n_ctx=256), n_vocab=300)


EXPERT_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q2_K", "Q4_K", "Q6_K", "MXFP4", "IQ2_XXS", "IQ4_XS")


@pytest.mark.parametrize("type_name", EXPERT_TYPES)
def test_experts_can_have_any_ggml_type(type_name: str, tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "tiny.gguf", "qwen3moe", expert_type=type_name, down_type="Q8_0")
    types = {name.split(".")[2]: t.tensor_type.name for name, t in expert_tensors(path).items()}
    assert types == {"ffn_gate_exps": type_name, "ffn_up_exps": type_name, "ffn_down_exps": "Q8_0"}
    check_healthy(stock_logits(path, prompt()))


@pytest.mark.parametrize(
    ("arch", "shape"),
    [
        ("granitemoe", Shape(n_ff_shared=128)),
        ("qwen2moe", Shape(n_ff_shared=512)),
        ("deepseek2", Shape(n_group=4, n_layer=3, n_dense=2)),
        ("deepseek2", Shape(n_layer=27, n_dense=26, n_expert=4)),
        ("gpt-oss", Shape(n_swa=8, n_layer=3)),
        ("smallthinker", Shape(sigmoid=True)),
    ],
)
def test_rarer_forms_run_as_well(arch: str, shape: Shape, tmp_path: Path) -> None:
    check_healthy(stock_logits(write_random_model(tmp_path / "tiny.gguf", arch, shape), prompt()))


def test_fused_and_split_gate_up_are_the_same_model(tmp_path: Path) -> None:
    logits = [
        stock_logits(write_random_model(tmp_path / f"{arch}.gguf", arch), prompt())
        for arch in ("deepseek2", "deepseek2-fused")
    ]
    assert np.array_equal(logits[0], logits[1])


def test_two_files_of_a_split_model_are_the_same_model(tmp_path: Path) -> None:
    whole = write_random_model(tmp_path / "whole.gguf", "olmoe")
    first = write_random_model(tmp_path / "parts.gguf", "olmoe", split=True)
    assert first.name == "parts-00001-of-00002.gguf"
    assert sorted(p.name for p in tmp_path.glob("parts*")) == [first.name, "parts-00002-of-00002.gguf"]
    assert {"split.no", "split.count", "split.tensors.count"} <= gguf.GGUFReader(first).fields.keys()
    assert np.array_equal(stock_logits(whole, prompt()), stock_logits(first, prompt()))


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    contents = [
        write_random_model(tmp_path / f"{i}.gguf", "llama", seed=seed).read_bytes()
        for i, seed in enumerate((3, 3, 4))
    ]
    assert contents[0] == contents[1] != contents[2]


def test_big_model_runs_and_no_two_of_its_experts_are_equal(tmp_path: Path) -> None:
    path = write_big_model(tmp_path / "big.gguf", n_layer=2, n_expert=16, n_embd=512, n_ff=256, n_used=4)
    slabs = [expert.tobytes() for t in expert_tensors(path).values() for expert in t.data]
    assert len(set(slabs)) == 2 * 3 * 16
    check_healthy(stock_logits(path, prompt(4096)), n_vocab=4096)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_can_be_tiled(arch: str, tmp_path: Path) -> None:
    path = write_big_model(tmp_path / "big.gguf", arch, 2, 8, 256, 256, 2, expert_type=None, n_vocab=512)
    check_healthy(stock_logits(path, prompt()))


def test_quantizing_is_what_llama_cpp_does() -> None:
    values = np.random.default_rng(0).standard_normal((4, 256), dtype=np.float32)
    encoded = quantize(values, "Q8_0")
    assert np.array_equal(encoded, gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0))
    restored = gguf.quants.dequantize(quantize(values, "Q4_K"), gguf.GGMLQuantizationType.Q4_K)
    assert np.abs(restored - values).mean() < 0.1


def test_type_falls_back_until_its_block_divides_the_row() -> None:
    assert [fitting_type("Q4_K", n) for n in (256, 128, 48)] == ["Q4_K", "Q8_0", "F16"]


def test_vocabulary_too_small_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"n_vocab is 64, but the vocabulary needs \d+; try vocab=False"):
        write_random_model(tmp_path / "tiny.gguf", "olmoe", Shape(n_vocab=64))


def test_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUF but no more")
    with pytest.raises(RuntimeError, match=r"no\.gguf: stock llama\.cpp does not load it"):
        stock_logits(tmp_path / "no.gguf", prompt())


def test_a_context_can_be_asked_twice_and_for_the_last_position_only(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "tiny.gguf", "gpt-oss")
    with stock_model(path) as model, stock_context(model, n_batch=16, n_ubatch=16) as ctx:
        logits = logits_of_context(ctx, model, prompt(), 16)
        assert np.array_equal(logits_of_context(ctx, model, prompt(), 16), logits)
        assert np.array_equal(logits_of_context(ctx, model, prompt(), 16, all_positions=False), logits[-1:])


@pytest.mark.usefixtures("llama_without_repacking")
def test_llama_class_completes_text_and_chats(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "tiny.gguf", "qwen3moe")
    llama = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, use_mmap=False, verbose=False)
    try:
        text = "the cat and the håt <|endoftext|>"
        tokens = llama.tokenize(text.encode(), add_bos=True, special=True)
        assert tokens[-1] == ID_OF_EOS
        assert len(tokens) < len(text)
        assert llama.detokenize(tokens, special=True).decode() == text
        reply = llama.create_completion("Once upon a time", max_tokens=24, temperature=0)
        assert reply["usage"]["completion_tokens"] == 24
        assert len(reply["choices"][0]["text"]) >= 24
        chat = llama.create_chat_completion([{"role": "user", "content": "Hi"}], max_tokens=8)
        assert chat["choices"][0]["message"]["content"]
    finally:
        llama.close()
