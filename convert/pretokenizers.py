"""The pre-tokenizers of Hugging Face tokenizers that llama.cpp knows, by what tokenizer.json says of them.

A pre-tokenizer is a list of steps: text is split by one, each piece by the next. llama.cpp has the same lists under
names, so the name follows from the list. Several names stand for one list where models differ in something else, as in
whether a piece that is a token is merged (`ignore_merges`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_S = r"'s|'t|'re|'ve|'m|'ll|'d"
_CONTRACTIONS = rf"(?i:{_S})"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _CONTRACTIONS + rf"|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}" + _TAIL
_QWEN2 = _CONTRACTIONS + rf"|{_LEAD}\p{{L}}+|\p{{N}}" + _TAIL
_GPT4O = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}" + _CASED_TAIL
)
_CJK = r"[一-龥ࠀ-一가-퟿]+"
# The cased letters of Unicode as the tokenizers of DeepSeek LLM, MoE and V2 list them.
_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ"
    "-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ"
    "-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)

DIGITS, GPT2 = "<digits>", "<gpt-2>"  # steps that are no regular expression

# the steps -> (name, ignore_merges), the usual name first
KNOWN: Mapping[tuple[str, ...], Sequence[tuple[str, bool]]] = {
    (GPT2,): [("gpt-2", False)],
    (DIGITS, GPT2): [("starcoder", False)],
    (_LLAMA3,): [("llama-bpe", True), ("dbrx", False)],
    (_QWEN2,): [("qwen2", False)],
    (_CONTRACTIONS + rf"|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
     r"|\s+(?!\S)|\s+",): [("qwen35", False)],
    (_GPT4O,): [("gpt-4o", False)],
    (rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _CASED_TAIL,): [("tekken", True)],
    (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _MARKS): [("deepseek-v3", False)],
    ("[\r\n]", rf"\s?[{_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, DIGITS):
        [("deepseek-llm", False)],
    ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"): [("deepseek-coder", False)],
    (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
     r"|\s+(?!\S)|\s+",): [("bailingmoe", False)],
    (_CONTRACTIONS + rf"|{_LEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?"
     r"|\s*[\r\n]|\s+(?!\S)|\s+",): [("exaone-moe", False)],
    (_CONTRACTIONS + rf"|{_LEAD}\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",):
        [("seed-coder", False)],
    (r"\p{N}{1,3}", _CONTRACTIONS + rf"|{_LEAD}\p{{L}}+|\p{{N}}+" + _TAIL): [("minicpm5", True)],
}  # fmt: skip

# They tell upper from lower case, which llama.cpp does for ASCII only: words of other letters may be split otherwise.
APART_BEYOND_ASCII = ("gpt-4o", "tekken")
# Several spaces before white space that is not of ASCII: 17 of 3,000 texts of mixed_strings() in the tests.
APART_IN_SPACES = ("deepseek-llm",)


def find_pre_tokenizer(steps: Sequence[Mapping[str, Any]], ignore_merges: bool) -> str:
    """llama.cpp's name. steps: of tokenizer.json. Raises ValueError, saying what is not known and what is."""
    found = _forms(steps)
    names = KNOWN.get(found)
    if names is None:
        unknown = " and ".join(map(_shown, found)) or "ByteLevel that does not split"
        raise ValueError(f"unknown pre-tokenizer: {unknown}; known: {', '.join(known_names())}")
    fitting = [name for name, ignores in names if ignores == ignore_merges]
    if not fitting:
        raise ValueError(f"pre-tokenizer {names[0][0]} with ignore_merges = {ignore_merges} is not supported")
    return fitting[0]


def known_names() -> list[str]:
    return [name for names in KNOWN.values() for name, _ in names]


def _forms(steps: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The steps as KNOWN has them: regular expressions, and words for those that are none."""
    found: list[str] = []
    for at, step in enumerate(steps):
        kind = step.get("type")
        if kind == "ByteLevel":
            if step.get("add_prefix_space"):
                raise ValueError("ByteLevel with add_prefix_space is not supported")
            if at != len(steps) - 1:
                raise ValueError("ByteLevel before the last step is not supported")
            if step.get("use_regex", True):
                found.append(GPT2)
        elif kind == "Digits" and step.get("individual_digits"):
            found.append(DIGITS)
        elif kind == "Split":
            found.append(_split(step))
        else:
            raise ValueError(f"unknown pre-tokenizer: {kind}; known: Split, Digits, ByteLevel")
    if not steps or steps[-1].get("type") != "ByteLevel":
        raise ValueError("a pre-tokenizer that does not end with ByteLevel is not supported")
    return tuple(found)


def _split(step: Mapping[str, Any]) -> str:
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if not isinstance(regex, str) or step.get("behavior") != "Isolated" or step.get("invert"):
        raise ValueError(
            f"unknown pre-tokenizer: Split {str(pattern)[:200]} {step.get('behavior')}; known: "
            f"{', '.join(known_names())}"
        )
    return regex


def _shown(form: str) -> str:
    return {DIGITS: "Digits", GPT2: "ByteLevel"}.get(form, f"Split {{'Regex': {form[:200]!r}}}")
