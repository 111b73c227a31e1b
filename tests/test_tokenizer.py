"""A converted tokenizer gives the same ids in llama.cpp as in the reference library, or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from moe_edge.convert.pretokenizers import DIGIT, DIGITS, GPT2, KNOWN, PUNCTUATION, PUNCTUATION_RUNS
from moe_edge.convert.tokenizer import read_tokenizer
from moe_edge.convert.vocabulary import Tokenizer
from moe_edge.models.errors import BadFile, MissingFile, UnknownName
from moe_edge.models.formats.gguf import read_gguf
from moe_edge.models.formats.keyvalues import parse_records
from moe_edge.models.formats.write import GGUFOutput, kv_string
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Reference

HELDOUT = Path("/work/shared/models/texts/heldout.txt")
TINY = Path("/work/shared/models/tiny-moe")
STEPS = {name: steps for steps, names in KNOWN.items() for name, _ in names}

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's what we've been told; they'll say I'd not believe it.",
    "def tokens(text: str) -> list[int]:\n    return [ord(c) for c in text if c != '\\t']\n\n\n",
    'In 1984, 2,048 of 65536 people (3.14159 %) said: "No"! ... and 007 left at 12:30.',
    "Über naïve façades, señor, здравствуй мир, 日本語のテキスト、中文文本, 한국어 텍스트, العربية, हिन्दी",
    "    four spaces,\ttabs\t\t, and    runs      of   them  \n \n  \r\n\r\n trailing   ",
    "emoji 🦙🔥👩‍👩‍👧 and math ∑∫√ ½ ² ٣ Ⅷ x² mixed1with2digits CamelCase snake_case DON'T WE'RE",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "\n",
    "\t \n  \r\n   x",
    "a  b   c    d     e      f       ",
    "1 12 123 1234 12345 1234567890 3.5e-10 0x1F",
    "'s't're've'm'll'd 'S 'T 'Re I'M you'LL he'D",
    "for (int i=0;i<10;++i){a[i]+=b->c*2;} // done\n#include <stdio.h>\n",
    'https://example.org/a?b=c&d=%20 <html><br/></html> {"k": [1, null]}',
    "\u00a0non\u00a0breaking\u2003em\u3000ideographic\u200bzero\ufeffbom",
    "e\u0301 combining, q\u0323\u0307, ﬁ ligature, ＡＢＣ fullwidth",
    "\x00\x01\x7f control \u0085 next line \u2028 line separator",
    "👍🏽 🇩🇪 🏳️‍🌈 𝒳𝓎𝓏 𐍈 \U0001f9ff",
    "before<|endoftext|>after <|im_start|>user\nhi<|im_end|>",
    "<tool>call</tool>  <tool>",
]


def pre_tokenizer_of(step: str) -> Any:
    kinds = {
        GPT2: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        DIGIT: pre_tokenizers.Digits(individual_digits=True),
        DIGITS: pre_tokenizers.Digits(individual_digits=False),
        PUNCTUATION: pre_tokenizers.Punctuation("isolated"),
        PUNCTUATION_RUNS: pre_tokenizers.Punctuation("contiguous"),
    }
    return kinds.get(step) or pre_tokenizers.Split(Regex(step), "isolated")


def train(
    pre: str, ignore_merges: bool = False, texts: Sequence[str] = CORPUS * 3, vocab_size: int = 700
) -> Reference:
    """A small byte-level BPE tokenizer with special and other added tokens."""
    tokenizer = Reference(models.BPE(ignore_merges=ignore_merges))
    steps = [pre_tokenizer_of(step) for step in STEPS[pre]]
    if GPT2 not in STEPS[pre]:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False), "</tool>"])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Reference, **settings: Any) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    defaults = {"eos_token": "<|endoftext|>", "bos_token": {"content": "<|endoftext|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(defaults | settings))
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "tokenizer.json") -> Path:
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))
    return folder


def write_vocabulary(path: Path, tokenizer: Tokenizer) -> Path:
    """A GGUF that llama.cpp loads with vocab_only."""
    kvs = {"general.architecture": kv_string("general.architecture", "olmoe")} | tokenizer.records()
    with GGUFOutput(path, kvs, []) as output:
        output.finish()
        output.commit()
    return path


class Vocabulary:
    """llama.cpp's tokenizer over a GGUF."""

    def __init__(self, path: Path) -> None:
        self.llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        ids: list[int] = self.llama.tokenize(text.encode(), add_bos=add_special, special=True)
        return ids


def test_ids_of_the_heldout_text_equal_those_of_the_reference_library(tmp_path: Path) -> None:
    if not (HELDOUT.exists() and TINY.exists()):
        pytest.skip(f"{HELDOUT} and {TINY} are not on this machine")
    made = read_tokenizer(TINY, json.loads((TINY / "config.json").read_text()))
    ours = Vocabulary(write_vocabulary(tmp_path / "vocab.gguf", made))
    text = HELDOUT.read_text(encoding="utf-8")
    assert ours.encode(text) == Reference.from_file(str(TINY / "tokenizer.json")).encode(text).ids


def test_string_and_pair_merges_are_the_same(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, train("gpt-2"))
    pairs = read_tokenizer(folder, {})
    edit(folder, lambda data: data["model"].update(merges=[" ".join(pair) for pair in data["model"]["merges"]]))
    assert read_tokenizer(folder, {}).merges == pairs.merges
    assert all(len(merge.split(" ")) == 2 for merge in pairs.merges)


def test_added_tokens_and_padding_have_their_types(tmp_path: Path) -> None:
    reference = train("gpt-2")
    n_tokens = reference.get_vocab_size()
    made = read_tokenizer(write_tokenizer(tmp_path, reference, pad_token="<|im_end|>"), {"vocab_size": n_tokens + 2})
    kinds = dict(zip(made.tokens, made.types, strict=True))
    assert (kinds["<|im_start|>"], kinds["<tool>"], kinds["a"]) == (3, 4, 1)
    assert made.tokens[-2:] == (f"[PAD{n_tokens}]", f"[PAD{n_tokens + 1}]") and made.types[-2:] == (5, 5)
    ids = {name: reference.token_to_id(text) for name, text in (("eos", "<|endoftext|>"), ("pad", "<|im_end|>"))}
    assert made.special == {"bos": ids["eos"], "eos": ids["eos"], "pad": ids["pad"]}
    kv = parse_records(made.records().values())
    assert kv["tokenizer.ggml.padding_token_id"] == ids["pad"]
    assert kv["tokenizer.ggml.add_bos_token"] is False


def test_special_ids_come_from_config_json_when_nothing_else_names_them(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, train("gpt-2"))
    (folder / "tokenizer_config.json").unlink()
    assert read_tokenizer(folder, {"eos_token_id": [7, 9], "bos_token_id": 5}).special == {"bos": 5, "eos": 7}
    with pytest.raises(UnknownName, match="end-of-sequence"):
        read_tokenizer(folder, {})
    with pytest.raises(BadFile, match="eos token id 99999 is not one of its"):
        read_tokenizer(folder, {"eos_token_id": 99999})


def test_template_that_adds_bos_adds_it_in_llama_cpp(tmp_path: Path) -> None:
    reference = train("qwen2")
    bos = reference.token_to_id("<|im_start|>")
    reference.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]),
        ]
    )
    made = read_tokenizer(write_tokenizer(tmp_path, reference, bos_token="<|im_start|>"), {})
    assert (made.add_bos, made.add_eos) == (True, False)
    ours = Vocabulary(write_vocabulary(tmp_path / "vocab.gguf", made))
    assert ours.encode("Hello", add_special=True) == reference.encode("Hello").ids
    edit(tmp_path, lambda settings: settings.update(bos_token="<|im_end|>"), "tokenizer_config.json")
    with pytest.raises(UnknownName, match="adds a bos token"):
        read_tokenizer(tmp_path, {})


def test_chat_templates_are_kept(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, train("gpt-2"), chat_template="{{ messages }}")
    assert read_tokenizer(folder, {}).chat_templates == {"default": "{{ messages }}"}
    named = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
    edit(folder, lambda settings: settings.update(chat_template=named), "tokenizer_config.json")
    path = write_vocabulary(tmp_path / "vocab.gguf", read_tokenizer(folder, {}))
    kv = read_gguf(path).kv
    assert (kv["tokenizer.chat_template"], kv["tokenizer.chat_template.rag"]) == ("a", "b")
    assert kv["tokenizer.chat_templates"] == ["rag"]
    edit(folder, lambda settings: settings.pop("chat_template"), "tokenizer_config.json")
    (folder / "chat_template.jinja").write_text("from a file")
    assert read_tokenizer(folder, {}).chat_templates == {"default": "from a file"}


def test_nfc_normalizer_is_accepted_with_a_note(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, train("qwen2"))
    edit(folder, lambda data: data.update(normalizer={"type": "NFC"}))
    assert "NFC" in read_tokenizer(folder, {}).notes[0]


def other_split(data: dict[str, Any]) -> None:
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "[a-z]+"}


@pytest.mark.parametrize(
    ("pre", "change", "says"),
    [
        ("gpt-2", lambda data: data["model"].update(type="Unigram"), "tokenizer model 'Unigram'"),
        ("gpt-2", lambda data: data["model"].update(byte_fallback=True), "byte_fallback"),
        ("gpt-2", lambda data: data.update(normalizer={"type": "Lowercase"}), "normalizer 'Lowercase'"),
        ("gpt-2", lambda data: data.update(pre_tokenizer=None), "unknown pre-tokenizer: None"),
        ("gpt-2", lambda data: data["pre_tokenizer"].update(use_regex=False), "unknown pre-tokenizer: ByteLevel"),
        ("gpt-2", lambda data: data["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space"),
        ("gpt-2", lambda data: data["added_tokens"][0].update(lstrip=True), "'<|endoftext|>' with lstrip"),
        ("gpt-2", lambda data: data.update(post_processor={"type": "RobertaProcessing"}), "'RobertaProcessing'"),
        ("qwen2", other_split, r"Split {'Regex': '[a-z]+'}"),
        ("qwen2", lambda data: data["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "Removed"),
    ],
)
def test_unknown_structure_is_refused_by_name(
    tmp_path: Path, pre: str, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    edit(write_tokenizer(tmp_path, train(pre)), change)
    with pytest.raises(UnknownName) as caught:
        read_tokenizer(tmp_path, {})
    assert says in str(caught.value) and "tokenizer.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data.pop("model"), "no 'model'"),
        (lambda data: data["model"].update(merges=None), "no list of merges"),
        (lambda data: data["model"]["merges"].append("a"), "merge 'a' is not a pair"),
        (lambda data: data["model"]["vocab"].update(x=0), "has id 0, which is no number or used twice"),
        (lambda data: data["added_tokens"][0].update(id="7"), "has no id or content"),
    ],
)
def test_damaged_tokenizer_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str) -> None:
    edit(write_tokenizer(tmp_path, train("gpt-2")), change)
    with pytest.raises(BadFile, match=says):
        read_tokenizer(tmp_path, {})


def test_vocabulary_larger_than_vocab_size_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, train("gpt-2"))
    with pytest.raises(BadFile, match=r"vocab_size in config\.json is 100"):
        read_tokenizer(tmp_path, {"vocab_size": 100})


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"tokenizer\.json: no such file"):
        read_tokenizer(tmp_path, {})
