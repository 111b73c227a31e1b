"""SentencePiece vocabularies: the same ids in llama.cpp as in the libraries that made them, or a refusal by name."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from moe_edge.convert.mixed_texts import mixed_strings
from moe_edge.convert.tokenizer import read_tokenizer
from moe_edge.convert.tokenizer_proof import check_tokenizer
from moe_edge.models.errors import BadFile, MoeEdgeError, UnknownName
from test_tokenizer import CORPUS, TEXTS, Vocabulary, write_vocabulary
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Reference

SPECIAL = ["<unk>", "<s>", "</s>"]


def train_model(folder: Path, kind: str, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """tokenizer.model in the folder, and its processor."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=made, vocab_size=600, model_type=kind,
        byte_fallback=kind == "bpe", character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
        split_digits=True, **options,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())


def usable(text: str) -> bool:
    """Not what SentencePiece's C strings end at, nor names of its own tokens."""
    return "\0" not in text and "<" not in text


@pytest.mark.parametrize("prefix", [True, False])
def test_a_bpe_model_gives_the_ids_of_sentencepiece(tmp_path: Path, prefix: bool) -> None:
    theirs = train_model(
        tmp_path, "bpe", add_dummy_prefix=prefix, normalization_rule_name="identity", remove_extra_whitespaces=False
    )
    made = read_tokenizer(tmp_path, {})
    assert (made.model, made.flags["add_space_prefix"], made.special["eos"]) == ("llama", prefix, 2)
    ours = Vocabulary(write_vocabulary(tmp_path / "vocab.gguf", made))
    for text in filter(usable, [*TEXTS, *mixed_strings(1000)]):
        assert ours.encode(text) == theirs.encode(text), text


def test_a_unigram_model_gives_the_ids_of_sentencepiece(tmp_path: Path) -> None:
    theirs = train_model(tmp_path, "unigram")
    made = read_tokenizer(tmp_path, {})
    assert made.model == "t5" and len(made.charsmap) > 1000
    ours = Vocabulary(write_vocabulary(tmp_path / "vocab.gguf", made))
    for text in filter(usable, [*CORPUS, *mixed_strings(300)]):
        found, wanted = [i for i in ours.encode(text) if i != 2], theirs.encode(text)
        if found != wanted:  # two ways of the same probability
            assert sum(made.scores[i] for i in found) == pytest.approx(sum(made.scores[i] for i in wanted)), text
            assert len(found) == len(wanted)


def test_a_unigram_model_that_falls_back_to_bytes_is_refused(tmp_path: Path) -> None:
    train_model(tmp_path, "bpe")
    data = (tmp_path / "tokenizer.model").read_bytes()
    at = data.rindex(b"\x18\x02", 0, data.rindex(b"\x98\x02\x01") if b"\x98\x02\x01" in data else len(data))
    (tmp_path / "tokenizer.model").write_bytes(data[: at + 1] + b"\x01" + data[at + 2 :])
    with pytest.raises(UnknownName, match="unigram with byte_fallback"):
        read_tokenizer(tmp_path, {})


def train_json(folder: Path, form: str) -> Reference:
    """tokenizer.json of a BPE with byte_fallback: as Llama's (prefixed, metaspace) or as Gemma's."""
    tokenizer = Reference(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    mark = normalizers.Replace(" ", "\u2581")
    if form == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    elif form == "gemma":
        tokenizer.normalizer = mark
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), mark])
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    )
    words = [word for text in CORPUS for word in text.split("\n")]
    tokenizer.train_from_iterator(words * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"] = [each for each in data["added_tokens"] if each["content"] in SPECIAL]  # bytes are not added
    (folder / "tokenizer.json").write_text(json.dumps(data))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Reference.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("form", ["prefixed", "metaspace", "gemma"])
def test_a_json_with_byte_fallback_gives_the_ids_of_its_library(tmp_path: Path, form: str) -> None:
    theirs = train_json(tmp_path, form)
    made = read_tokenizer(tmp_path, {"vocab_size": theirs.get_vocab_size() + 3})
    assert made.model == ("gemma4" if form == "gemma" else "llama")
    assert made.add_bos and not made.add_eos
    assert made.tokens[-1].startswith("[PAD")
    if form != "gemma":
        noted = check_tokenizer(tmp_path, made.records(), made.pre) or ""
        assert ("begins with one" in noted) == (form == "metaspace")
    ours = Vocabulary(write_vocabulary(tmp_path / "vocab.gguf", made))
    for text in filter(usable, [*CORPUS, *mixed_strings(500)]):
        if text and not (form == "gemma" and "\n\n" in text) and not (form == "metaspace" and text[0] == " "):
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


def set_normalizer(data: dict[str, Any]) -> None:
    data["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_normalizer, "normalizer ['Lowercase'] with pre-tokenizer None"),
        (lambda data: data["model"]["merges"].append(["a"]), "merge ['a'] is not a pair"),
        (lambda data: data["model"]["vocab"].update(twice=5), "has id 5, which is no number or used twice"),
        (lambda data: data.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer Whitespace"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    train_json(tmp_path, "prefixed")
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(MoeEdgeError) as caught:
        read_tokenizer(tmp_path, {})
    assert says in str(caught.value) and isinstance(caught.value, BadFile | UnknownName)


def test_a_damaged_model_file_is_one_sentence(tmp_path: Path) -> None:
    train_model(tmp_path, "bpe")
    whole = (tmp_path / "tokenizer.model").read_bytes()
    for cut in range(0, len(whole) - 1, 97):
        (tmp_path / "tokenizer.model").write_bytes(whole[:cut])
        try:
            read_tokenizer(tmp_path, {})
        except (BadFile, UnknownName) as error:
            assert "tokenizer.model" in str(error)
    for seed in range(0, len(whole), 211):
        (tmp_path / "tokenizer.model").write_bytes(whole[:seed] + bytes([whole[seed] ^ 0x5A]) + whole[seed + 1 :])
        try:
            read_tokenizer(tmp_path, {})
        except (BadFile, UnknownName) as error:
            assert "tokenizer.model" in str(error)


def test_a_wordpiece_model_is_refused(tmp_path: Path) -> None:
    tokenizer = Reference(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnknownName, match="tokenizer model 'WordPiece' is not supported"):
        read_tokenizer(tmp_path, {})
