"""Tokenizers that are there as tiktoken ranks: the merges they come to, their special tokens, and whole checkpoints."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from checkpoints import floats
from moe_edge.convert.convert import convert
from moe_edge.convert.differences import may_differ
from moe_edge.convert.merging import merged
from moe_edge.convert.mixed_texts import mixed_strings
from moe_edge.convert.pretokenizers import expression_of
from moe_edge.convert.ranks import RANKS, byte_letters, merges_of, ranks_in, read_ranks
from moe_edge.convert.tokenizer import read_tokenizer
from moe_edge.convert.tokenizer_proof import check_tokenizer
from moe_edge.convert.vocabulary import CONTROL, NORMAL, UNUSED
from moe_edge.models.errors import BadFile, UnknownName
from moe_edge.models.formats.gguf import read_gguf
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.sizes import sizes_of
from test_safetensors import to_bf16, write_safetensors
from test_tokenizer import CORPUS, TEXTS, Vocabulary, train, write_vocabulary

ROOT = Path(__file__).resolve().parents[1]
PYTHON, LLAMA_CPP = ROOT / "build" / "reference" / "bin" / "python", ROOT / "build" / "llama.cpp"
KINDS = {kind.pre: kind for kind in RANKS}
N_SPECIAL = 210


def trained(pre: str, vocab_size: int = 1500) -> tuple[list[bytes], list[tuple[bytes, bytes]]]:
    """(tokens in the order of their ranks, the merges that made them) of a tokenizer trained on our texts."""
    texts = [*CORPUS, *TEXTS, *mixed_strings(1000, seed=3)]
    data = json.loads(train(pre, texts=texts, vocab_size=vocab_size).to_str())
    bytes_of = {letter: byte for byte, letter in enumerate(byte_letters())}

    def plain(token: str) -> bytes:
        return bytes(bytes_of[letter] for letter in token)

    added = {token["content"] for token in data["added_tokens"]}
    vocab = {token: i for token, i in data["model"]["vocab"].items() if token not in added}
    merges = [(plain(left), plain(right)) for left, right in data["model"]["merges"]]
    return [plain(token) for token in sorted(vocab, key=lambda each: vocab[each])], merges


def write_ranks(folder: Path, kind: str, tokens: Sequence[bytes], **settings: Any) -> Path:
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (folder / KINDS[kind].file).write_text("".join(lines))
    settings = {"tokenizer_class": KINDS[kind].classes[0]} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def config_of(n_ranks: int, **changes: Any) -> dict[str, Any]:
    return {"vocab_size": n_ranks + N_SPECIAL, "bos_token_id": n_ranks, "eos_token_id": n_ranks + 1} | changes


def test_a_piece_is_merged_by_rank_the_leftmost_first() -> None:
    ranks = {b"aa": 3, b"ab": 1, b"aab": 2, b"bb": 5}

    def rank(left: bytes, right: bytes) -> int | None:
        return ranks.get(left + right)

    def parts(text: str) -> list[bytes]:
        return merged([text[i : i + 1].encode() for i in range(len(text))], rank)

    assert parts("aab") == [b"aab"] and parts("aaa") == [b"aa", b"a"] and parts("abbb") == [b"ab", b"bb"]
    assert parts("c") == [b"c"] and parts("") == []


@pytest.mark.parametrize("pre", KINDS)
def test_ranks_come_to_the_merges_that_made_them(pre: str) -> None:
    tokens, merges = trained(pre)
    assert len(merges) == len(tokens) - 256 > 1000
    assert merges_of({token: rank for rank, token in enumerate(tokens)}) == (merges, [])


@pytest.mark.parametrize("pre", KINDS)
def test_ids_equal_those_of_tiktoken(tmp_path: Path, pre: str) -> None:
    tokens, _ = trained(pre)
    config = config_of(len(tokens))
    (write_ranks(tmp_path, pre, tokens) / "config.json").write_text(json.dumps(config))
    made = read_tokenizer(tmp_path, config)
    note = check_tokenizer(tmp_path, made.records(), made.pre) or ""
    assert made.pre == pre and ("letters beyond ASCII" in note) == (pre == "kimi-k2")
    special = {text: i for i, text in enumerate(made.tokens) if made.types[i] == CONTROL}
    reference = tiktoken.Encoding(
        "reference", pat_str=expression_of(pre), special_tokens=special,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
    )  # fmt: skip
    ours = Vocabulary(write_vocabulary(tmp_path / "vocab.gguf", made))
    n_apart = 0
    named = ["".join(list(special)[:3]), f"a{list(special)[4]} b"]
    for text in [*TEXTS, *named, *mixed_strings(1000, seed=3)]:
        same = ours.encode(text) == reference.encode(text, allowed_special="all")
        assert same or may_differ(pre, text), text
        n_apart += not same
    assert (n_apart > 0) == (pre == "kimi-k2")


def test_special_tokens_are_those_of_the_settings_or_of_the_class(tmp_path: Path) -> None:
    tokens = [bytes((i,)) for i in range(256)]
    named = {"256": {"content": "[BOS]", "special": True}, "258": {"content": "<|im_end|>", "special": False}}
    write_ranks(tmp_path, "kimi-k2", tokens, added_tokens_decoder=named, bos_token="[BOS]", eos_token="<|im_end|>")
    made = read_tokenizer(tmp_path, {"vocab_size": 520})
    assert made.tokens[255:260] == ("ÿ", "[BOS]", "<|reserved_token_257|>", "<|im_end|>", "<|reserved_token_259|>")
    assert made.special == {"bos": 256, "eos": 258}
    assert made.tokens[513:516] == ("<|reserved_token_513|>", "[PAD514]", "[PAD515]")
    assert made.types[255:257] == (NORMAL, CONTROL) and made.types[513:515] == (CONTROL, UNUSED)
    # what config.json says comes first, as in llama.cpp's converter
    assert read_tokenizer(tmp_path, {"vocab_size": 520, "eos_token_id": [300, 301]}).special["eos"] == 300
    (tmp_path / "tiktoken.model").unlink()
    write_ranks(tmp_path, "hunyuan", tokens)
    made = read_tokenizer(tmp_path, {"vocab_size": 263, "bos_token_id": 1, "eos_token_id": 259})
    assert made.tokens[256:] == (
        "<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>", "<|extra_0|>", "<|extra_1|>"
    )  # fmt: skip
    assert made.special == {"bos": 258, "eos": 259}  # its config.json names a wrong bos
    assert "NFC" in made.notes[0]


def test_a_token_that_no_two_others_make_is_counted(tmp_path: Path) -> None:
    tokens = [*(bytes((i,)) for i in range(256)), b"ab", b"wxyz"]
    made = read_tokenizer(write_ranks(tmp_path, "kimi-k2", tokens), config_of(258))
    assert made.merges == ("a b",) and "1 tokens of tiktoken.model are merged of no two others" in made.notes[-1]
    # " of" comes in the texts that are compared: what comes of it is counted and said
    (tmp_path / "tiktoken.model").unlink()
    made = read_tokenizer(write_ranks(tmp_path, "hunyuan", [*tokens[:-1], b" of"]), config_of(258))
    (tmp_path / "config.json").write_text(json.dumps(config_of(258)))
    note = check_tokenizer(tmp_path, made.records(), made.pre) or ""
    assert re.search(r"split texts with one of 1 tokens .* it did in [1-9]\d* of 1012 mixed texts, first in", note)
    with pytest.raises(UnknownName, match="as other tokens than this checkpoint's tokenizer does"):
        write_ranks(tmp_path, "hunyuan", [*tokens[:-2], b"He", b"el"])  # other ranks than were converted
        check_tokenizer(tmp_path, made.records(), made.pre)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("IQ== 0\nIg== 2\n", r"line 2 has rank 2 for .*, expected a new token with rank 1"),
        ("IQ== 0\nIQ== 1\n", "line 2 has rank 1"),
        ("IQ== 0\n\nI_Q= 1\n", "line 3 is .*, expected a token in base64 and its rank"),
        ("IQ== x\n", "line 1 is"),
        ("IQ==\n", "line 1 is"),
        ("IQ== 0 0\n", "line 1 is"),
        ("IQ== 0\n", r"has 1 tokens, and none for 255 of the 256 bytes \(\[0, 1, 2, 3\]\)"),
        ("", "has 0 tokens"),
    ],
)
def test_damaged_ranks_are_refused(tmp_path: Path, lines: str, says: str) -> None:
    write_ranks(tmp_path, "kimi-k2", [])
    (tmp_path / "tiktoken.model").write_text(lines)
    with pytest.raises(BadFile, match=says):
        read_tokenizer(tmp_path, {})


def test_ranks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tokens = [bytes((i,)) for i in range(256)]
    write_ranks(tmp_path, "kimi-k2", tokens, tokenizer_class="GPT2Tokenizer")
    with pytest.raises(UnknownName, match=r"class 'GPT2Tokenizer' is not known with tiktoken.model; known: TikToken"):
        read_tokenizer(tmp_path, config_of(256))
    write_ranks(tmp_path, "kimi-k2", tokens)
    for size in (255, "many", 1 << 30):
        with pytest.raises(BadFile, match=r"has 256 ranks.*vocab_size in config.json is"):
            read_tokenizer(tmp_path, config_of(256, vocab_size=size))
    for number, content in (("7", "[BOS]"), ("999", "[BOS]"), ("x", "[BOS]"), ("257", 5)):
        write_ranks(tmp_path, "kimi-k2", tokens, added_tokens_decoder={number: {"content": content}})
        with pytest.raises(BadFile, match=r"special tokens|has no id or content"):
            read_tokenizer(tmp_path, config_of(256))
    write_ranks(tmp_path, "kimi-k2", tokens, added_tokens_decoder={i: {"content": "a"} for i in ("257", "258")})
    with pytest.raises(BadFile, match="two of its special tokens have the same text"):
        read_tokenizer(tmp_path, config_of(256))
    assert ranks_in(tmp_path) is KINDS["kimi-k2"] and len(read_ranks(tmp_path / "tiktoken.model")) == 256


@pytest.mark.reference
@pytest.mark.skipif(
    not (PYTHON.exists() and LLAMA_CPP.exists()) and "CI" not in os.environ,
    reason="llama.cpp's converter is not set up: make reference",
)
@pytest.mark.parametrize(
    ("pre", "kind"), [("kimi-k2", "DeepseekV3ForCausalLM"), ("hunyuan", "HunYuanMoEV1ForCausalLM")]
)
def test_the_vocabulary_is_that_of_llama_cpps_converter(tmp_path: Path, pre: str, kind: str) -> None:
    tokens, _ = trained(pre)
    n = len(tokens)
    named = {str(n): {"content": "[BOS]"}, str(n + 2): {"content": "<|im_end|>"}} if pre == "kimi-k2" else {}
    config = config_of(n, pad_token_id=n + 5)
    (write_ranks(tmp_path, pre, tokens, added_tokens_decoder=named) / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [PYTHON, ROOT / "tests" / "reference_ranks.py", tmp_path, kind, pre, LLAMA_CPP], capture_output=True,
        text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    theirs, made = json.loads(done.stdout), read_tokenizer(tmp_path, config)
    assert theirs["add_tokenizer_model"] == made.model and theirs["add_tokenizer_pre"] == made.pre
    assert theirs["add_token_list"] == list(made.tokens) and theirs["add_token_types"] == list(made.types)
    assert theirs["add_token_merges"] == list(made.merges)
    assert (theirs["add_eos_token_id"], theirs["add_pad_token_id"]) == (made.special["eos"], made.special["pad"])
    # it writes the id that <|bos|> has in HunYuan-A13B, where we look for the token
    assert theirs["add_bos_token_id"] == (127959 if pre == "hunyuan" else made.special["bos"])
    assert made.tokens[made.special["bos"]] == ("<|bos|>" if pre == "hunyuan" else "[BOS]")


# ---- whole checkpoints

N_EMBD, N_FF, N_LAYER, N_EXPERT = 64, 32, 2, 4


def kimi_tensors(n_vocab: int) -> dict[str, np.ndarray]:
    """Of two heads whose keys are 16 wide and as much with positions, as are the values."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(N_LAYER):
        p = f"model.layers.{layer}."
        shapes |= {
            f"{p}self_attn.q_a_proj.weight": (48, N_EMBD), f"{p}self_attn.q_a_layernorm.weight": (48,),
            f"{p}self_attn.q_b_proj.weight": (2 * 32, 48), f"{p}self_attn.kv_a_proj_with_mqa.weight": (48, N_EMBD),
            f"{p}self_attn.kv_a_layernorm.weight": (32,), f"{p}self_attn.kv_b_proj.weight": (2 * 32, 32),
            f"{p}self_attn.o_proj.weight": (N_EMBD, 32), f"{p}input_layernorm.weight": (N_EMBD,),
            f"{p}post_attention_layernorm.weight": (N_EMBD,),
        }  # fmt: skip
        if layer:
            shapes[f"{p}mlp.gate.weight"] = (N_EXPERT, N_EMBD)
            shapes[f"{p}mlp.gate.e_score_correction_bias"] = (N_EXPERT,)
            parts = [*(f"experts.{i}." for i in range(N_EXPERT)), "shared_experts."]
        else:
            parts = [""]
        shapes |= feed_forward(p, parts)
    return whole(shapes, n_vocab)


def hunyuan_tensors(n_vocab: int) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(N_LAYER):
        p = f"model.layers.{layer}."
        shapes |= {f"{p}self_attn.{each}_proj.weight": (N_EMBD if each in "qo" else 32, N_EMBD) for each in "qkvo"}
        shapes |= {f"{p}self_attn.{each}_layernorm.weight": (16,) for each in ("query", "key")}
        shapes |= {f"{p}{each}_layernorm.weight": (N_EMBD,) for each in ("input", "post_attention")}
        shapes[f"{p}mlp.gate.wg.weight"] = (N_EXPERT, N_EMBD)
        shapes |= feed_forward(p, [*(f"experts.{i}." for i in range(N_EXPERT)), "shared_mlp."])
    return whole(shapes, n_vocab)


def feed_forward(prefix: str, parts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}mlp.{part}{name}_proj.weight": shape
        for part in parts
        for name, shape in (("gate", (N_FF, N_EMBD)), ("up", (N_FF, N_EMBD)), ("down", (N_EMBD, N_FF)))
    }


def whole(shapes: dict[str, tuple[int, ...]], n_vocab: int) -> dict[str, np.ndarray]:
    shapes |= {"model.embed_tokens.weight": (n_vocab, N_EMBD), "lm_head.weight": (n_vocab, N_EMBD)}
    return {name: floats(*shape) for name, shape in {**shapes, "model.norm.weight": (N_EMBD,)}.items()}


COMMON = {
    "hidden_size": N_EMBD, "intermediate_size": N_FF, "num_hidden_layers": N_LAYER, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip
CHECKPOINTS = {
    "kimi-k2": (kimi_tensors, {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "num_attention_heads": 2,
        "num_key_value_heads": 2, "moe_intermediate_size": N_FF, "n_routed_experts": N_EXPERT, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1, "topk_group": 1,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.827,
        "kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
        "rope_theta": 50000.0, "num_nextn_predict_layers": 0,
        "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096, "type": "yarn"}}),
    "hunyuan": (hunyuan_tensors, {
        "architectures": ["HunYuanMoEV1ForCausalLM"], "model_type": "hunyuan_v1_moe", "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "num_experts": N_EXPERT, "moe_topk": [2] * N_LAYER,
        "moe_intermediate_size": [N_FF] * N_LAYER, "num_shared_expert": [1] * N_LAYER, "use_qk_norm": True,
        "use_cla": False, "rope_theta": 10000.0,
        "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
                         "mscale_all_dim": 1.0, "type": "dynamic"}}),
}  # fmt: skip


@pytest.mark.parametrize("pre", CHECKPOINTS)
def test_a_checkpoint_with_ranks_converts_and_runs(tmp_path: Path, pre: str) -> None:
    make, settings = CHECKPOINTS[pre]
    tokens, _ = trained(pre, 600)
    folder = tmp_path / "model"
    folder.mkdir()
    write_ranks(folder, pre, tokens, chat_template="{{ messages }}")
    config = {**COMMON, **settings, **config_of(len(tokens))}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = make(config["vocab_size"])
    write_safetensors(folder / "model.safetensors", {n: ("BF16", to_bf16(a)) for n, a in tensors.items()})
    result = convert(folder, model := tmp_path / "model.gguf")
    kv = read_gguf(model).kv
    assert kv["tokenizer.ggml.pre"] == pre and kv["tokenizer.ggml.model"] == "gpt2"
    assert len(kv["tokenizer.ggml.tokens"]) == config["vocab_size"]
    assert ("letters beyond ASCII" in " ".join(result.notes)) == (pre == "kimi-k2")
    if pre == "hunyuan":
        assert kv["hunyuan-moe.rope.freq_base"] == pytest.approx(1e4 * 1000 ** (16 / 14), rel=1e-6)
        assert (kv["hunyuan-moe.context_length"], kv["hunyuan-moe.rope.scaling.type"]) == (1 << 18, "none")
    text = "It's 1984: def f(x): return [你好, мир]"
    reference = tiktoken.Encoding(
        "reference", pat_str=expression_of(pre), special_tokens={},
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
    )  # fmt: skip
    floor = sizes_of(model, EngineOptions(n_ctx=256, n_threads=1)).plan.floor_bytes
    rows = []
    for ram in (None, floor):
        with Engine(model, EngineOptions(ram_bytes=ram, n_ctx=256, n_threads=1, logits_all=True)) as engine:
            found = engine.llama.tokenize(text.encode(), add_bos=False)
            assert found == reference.encode(text)
            with engine.decoding():
                engine.llama.eval(found)
                rows.append(engine.llama.scores[: len(found)].copy())
    assert np.isfinite(rows[0]).all() and np.array_equal(rows[0], rows[1])
