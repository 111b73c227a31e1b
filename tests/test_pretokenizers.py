"""Every pre-tokenizer that llama.cpp knows is recognised by its name, and gives the same tokens or says where not."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from moe_edge.convert import known_tokenizers
from moe_edge.convert.differences import DIFFERENCES, may_differ
from moe_edge.convert.known_tokenizers import CHECK_TEXT, NAMES, digest_of
from moe_edge.convert.mixed_texts import mixed_strings
from moe_edge.convert.pretokenizers import KNOWN, find_pre_tokenizer, known_names
from moe_edge.convert.tokenizer import read_tokenizer
from moe_edge.convert.tokenizer_proof import check_tokenizer
from moe_edge.models.errors import UnknownName
from moe_edge.models.formats.gguf import read_gguf
from test_tokenizer import CORPUS, STEPS, TEXTS, Vocabulary, edit, train, write_tokenizer, write_vocabulary
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Reference

LLAMA_CPP = Path(__file__).resolve().parents[1] / "build" / "llama.cpp"
# the usual name of each list, and of each kind of merging that llama.cpp has with it
USUAL = [
    next(name for name, each in names if each == ignores)
    for names in KNOWN.values() for ignores in sorted({each for _, each in names})
]  # fmt: skip
IGNORES_MERGES = {name for names in KNOWN.values() for name, ignores in names if ignores}
needs_llama_cpp = pytest.mark.skipif(
    not LLAMA_CPP.exists() and "CI" not in os.environ, reason="llama.cpp's converter is not unpacked: make reference"
)


@pytest.mark.parametrize("pre", USUAL)
def test_ids_equal_those_of_the_reference_library(tmp_path: Path, pre: str) -> None:
    # Trained on such texts, so that many pieces are tokens and another split shows.
    # More of them where a difference is rare.
    trained_on = mixed_strings(500 if pre in ("granite-embed-multi-97m", "youtu") else 250, seed=3)
    reference = train(pre, pre in IGNORES_MERGES, [*CORPUS, *TEXTS, *trained_on], 1500)
    made = read_tokenizer(write_tokenizer(tmp_path, reference), {})
    assert made.pre == pre
    note = check_tokenizer(tmp_path, made.records(), pre) or ""  # of 1,000 others by chance
    assert [each.words in note for each in DIFFERENCES.get(pre, ())] == [True] * len(DIFFERENCES.get(pre, ()))
    ours = Vocabulary(write_vocabulary(tmp_path / "vocab.gguf", made))
    apart = [text for text in [*TEXTS, *trained_on] if ours.encode(text) != reference.encode(text).ids]
    assert all(may_differ(pre, text) for text in apart)
    assert bool(apart) == (pre in DIFFERENCES), "what is said to differ does, and nothing else"


def test_names_of_one_list_mean_the_same(tmp_path: Path) -> None:
    for names in KNOWN.values():
        usual = names[0][0]
        made = read_tokenizer(write_tokenizer(tmp_path, train(usual, usual in IGNORES_MERGES)), {})
        tokens = None
        for name, _ in names:
            (tmp_path / "vocab.gguf").unlink(missing_ok=True)
            records = {**vars(made), "pre": name}
            ours = Vocabulary(write_vocabulary(tmp_path / "vocab.gguf", type(made)(**records)))
            found = [ours.encode(text) for text in TEXTS]
            if name not in DIFFERENCES:
                assert tokens is None or found == tokens, name
                tokens = found


def split_by(*steps: dict[str, Any]) -> list[dict[str, Any]]:
    return [*steps, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("pre", "steps"),
    [
        ("gpt-2", split_by(split(GPT2_REGEX))),
        ("starcoder", split_by(split(r"\p{N}"), split(GPT2_REGEX))),
        ("dbrx", split_by(split(STEPS["dbrx"][0], "Removed", True))),  # as those of tiktoken are written
        ("qwen2", split_by(split(STEPS["qwen2"][0].replace(r"\r", "\r").replace(r"\n", "\n")))),
        ("gpt-4o", split_by(split(STEPS["gpt-4o"][0].replace(
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")))),
        ("bailingmoe", split_by(split(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
            r"|\s+(?!\S)|\s+"))),
        ("superbpe", split_by({"type": "Digits", "individual_digits": False}, split(r"(?=(\d{3})+(?!\d))"))),
        ("viking", split_by(split(STEPS["bloom"][0]), {"type": "Digits", "individual_digits": True})),
    ],
)  # fmt: skip
def test_other_spellings_of_a_list_are_recognised(pre: str, steps: list[dict[str, Any]]) -> None:
    assert find_pre_tokenizer(steps, ignore_merges=False) == pre
    with pytest.raises(ValueError, match="unknown pre-tokenizer"):
        find_pre_tokenizer([split("[a-z]"), *steps], ignore_merges=False)


def test_what_a_split_drops_is_not_recognised() -> None:
    with pytest.raises(ValueError, match="Removed inverted"):
        find_pre_tokenizer(split_by(split(STEPS["bloom"][0], "Removed", True)), ignore_merges=False)


def test_ignored_merges_are_taken_where_they_change_nothing(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, train("qwen2", ignore_merges=True))
    assert read_tokenizer(folder, {}).pre == "qwen2"
    edit(folder, lambda data: data["model"]["vocab"].update(zzzz=9999))  # which no merges lead to
    with pytest.raises(UnknownName, match="qwen2 with ignore_merges = True"):
        read_tokenizer(folder, {})


def test_a_known_model_has_the_name_that_its_tokens_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = train("qwen2")
    folder = write_tokenizer(tmp_path, reference)
    digest = digest_of(reference.encode(CHECK_TEXT).ids)
    assert digest not in NAMES and read_tokenizer(folder, {}).pre == "qwen2"
    monkeypatch.setattr(known_tokenizers, "NAMES", {digest: "hunyuan"})
    assert read_tokenizer(folder, {}).pre == "hunyuan"
    monkeypatch.setattr(known_tokenizers, "NAMES", {digest: "falcon"})  # which has another list
    assert read_tokenizer(folder, {}).pre == "qwen2"


def test_a_known_model_is_recognised_whatever_its_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = train("qwen2")
    folder = write_tokenizer(tmp_path, reference)

    def respell(data: dict[str, Any]) -> None:
        step = data["pre_tokenizer"]["pretokenizers"][0]
        step["pattern"]["Regex"] = step["pattern"]["Regex"].replace(r"\p{L}", r"\p{Letter}")

    edit(folder, respell)
    with pytest.raises(UnknownName, match="unknown pre-tokenizer"):
        read_tokenizer(folder, {})
    monkeypatch.setattr(known_tokenizers, "NAMES", {digest_of(reference.encode(CHECK_TEXT).ids): "qwen2"})
    made = read_tokenizer(folder, {})
    assert made.pre == "qwen2" and "known by its tokens" in made.notes[0]
    # what its tokenizer really does is compared, counted and said
    assert check_tokenizer(folder, made.records(), made.pre) is None
    monkeypatch.setattr(known_tokenizers, "NAMES", {digest_of(reference.encode(CHECK_TEXT).ids): "seed-coder"})
    made = read_tokenizer(folder, {})
    assert re.search(r"seed-coder may split other texts .* it did in [1-9]\d* of 1012 mixed texts, first in",
                     check_tokenizer(folder, made.records(), made.pre) or "")  # fmt: skip


def test_a_difference_that_is_not_expected_is_refused(tmp_path: Path) -> None:
    made = read_tokenizer(write_tokenizer(tmp_path, train("qwen2")), {})
    with pytest.raises(UnknownName, match=r"as other tokens than .* convert_hf_to_gguf.py"):
        check_tokenizer(tmp_path, {**made.records(), **type(made)(**{**vars(made), "pre": "gpt-2"}).records()}, "gpt-2")


@needs_llama_cpp
@pytest.mark.reference
def test_digests_are_those_of_llama_cpps_converter() -> None:
    source = (LLAMA_CPP / "conversion" / "base.py").read_text(encoding="utf-8")
    theirs = dict(re.findall(r'if chkhsh == "([0-9a-f]{64})":\n.*\n\s*res = "([^"]+)"', source))
    assert len(theirs) > 90
    of_words = ("bert-bge", "bert-bge-large", "jina-v2-en")  # WordPiece
    assert {each[:16]: name for each, name in theirs.items() if name not in of_words} == NAMES
    text = re.search(r"chktxt = ('.*')\n", source)
    assert text is not None and eval(text[1]) == CHECK_TEXT


@needs_llama_cpp
@pytest.mark.reference
def test_every_name_of_llama_cpp_is_known() -> None:
    source = (LLAMA_CPP / "src" / "llama-vocab.cpp").read_text(encoding="utf-8")
    theirs = set(re.findall(r'tokenizer_pre == "([^"]+)"', source))
    assert len(theirs) > 75
    others = {
        "default",  # what a file without a name gets: no model has it
        "gemma4", "granite-embed-multi-311m", "sarvam-moe",  # SentencePiece's spaces, no bytes: sentencepiece.py
        "whitespace",  # of embedding models, whose tokenizer changes the text: no model of experts has it
    }  # fmt: skip
    assert theirs - others == set(known_names())
    assert set(DIFFERENCES) <= set(known_names()) and set(NAMES.values()) <= theirs


# Vocabularies of real models that llama.cpp's source package has. That of qwen35 is of another release than its digest.
REAL = ["deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "qwen2", "qwen35", "starcoder"]


@needs_llama_cpp
@pytest.mark.reference
@pytest.mark.parametrize("name", REAL)
def test_real_vocabularies_have_the_name_of_llama_cpps_converter(tmp_path: Path, name: str) -> None:
    path = LLAMA_CPP / "models" / f"ggml-vocab-{name}.gguf"
    kv = read_gguf(path).kv
    pre, tokens, kinds, merges = (kv[f"tokenizer.ggml.{key}"] for key in ("pre", "tokens", "token_type", "merges"))
    vocab = {text: i for i, text in enumerate(tokens)}
    pairs = [tuple(each.split(" ", 1)) for each in merges]
    reference = Reference(models.BPE(vocab, pairs, ignore_merges=pre in IGNORES_MERGES))
    reference.pre_tokenizer = train(pre, vocab_size=300).pre_tokenizer
    for text, kind in zip(tokens, kinds, strict=True):
        if kind in (3, 4):
            reference.add_tokens([AddedToken(text, special=kind == 3, normalized=False)])
    made = reference.encode(CHECK_TEXT).ids
    digests = (digest_of(made), digest_of([kv["tokenizer.ggml.bos_token_id"], *made]))
    assert name == "qwen35" or pre in map(NAMES.get, digests)
    wanted = (path.parent / (path.name + ".out")).read_text().split("\n")
    texts = (path.parent / (path.name + ".inp")).read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    for text, ids in zip(texts, wanted, strict=False):
        assert reference.encode(text).ids == [int(each) for each in ids.split()], text
