"""The pre-tokenizers of Hugging Face tokenizers that llama.cpp knows, by what tokenizer.json says of them.

A pre-tokenizer is a list of steps: text is split by one, each piece by the next. llama.cpp has the same lists under
names, so the name follows from the list. Models whose lists are alike have names of their own in llama.cpp, which mean
the same to it but for `ignore_merges` (whether a piece that is a token is taken as it is). Which of them a tokenizer
has is known by its tokens (known_tokenizers.py); else the usual name is taken.

One list can be spelled in several ways; _forms() brings them to one. The lists are those of the switch over
`LLAMA_VOCAB_PRE_TYPE` in src/llama-vocab.cpp, which says what each was in tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(suffix: str, barred: str = "") -> str:
    """Words that begin in upper case or are all of it. barred: what letters may not be, in a class."""
    upper, lower = f"[{_UPPER}{barred}]", f"[{_LOWER}{barred}]"
    return rf"{_LEAD}{upper}*{lower}+{suffix}|{_LEAD}{upper}+{lower}*{suffix}"


_WORDS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_MARKS = _WORDS + r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPARK = _WORDS + r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + rf"|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}" + _TAIL
_JAIS2 = _LLAMA3.removesuffix(r"\s+(?!\S)|\s+") + "".join(
    rf"\s{{{n}}}(?!\S)|" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")
) + r"\s{1}"  # fmt: skip
_QWEN2 = _CONTRACTIONS + rf"|{_LEAD}\p{{L}}+|\p{{N}}" + _TAIL
_GPT4O = _cased(_CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _CASED_TAIL
_KIMI = r"[\p{Han}]+|" + _cased(_CONTRACTIONS + "?", r"&&[^\p{Han}]") + r"|\p{N}{1,3}" + _TAIL
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_HAN_KANA = "[一-龥぀-ゟ゠-ヿ]+"
_YOUTU_SCRIPTS = f"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|{_HAN_KANA}"
_ASIAN = "[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+"
_CJK = r"[一-龥ࠀ-一가-퟿]+"
# The cased letters of Unicode as the tokenizers of DeepSeek LLM, MoE and V2 list them.
_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ"
    "-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ"
    "-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)


def _named(names: str, ignore_merges: bool = False) -> list[tuple[str, bool]]:
    return [(name, ignore_merges) for name in names.split()]


# Steps that are no regular expression. BYTES: ByteLevel that splits nothing, before another step.
GPT2, BYTES, PUNCTUATION, PUNCTUATION_RUNS = "<gpt-2>", "<bytes>", "<punctuation>", "<punctuation runs>"
DIGIT, DIGITS = r"\p{N}", r"\p{N}+"
_DIGITS_BY_3 = r"\p{N}{1,3}"

# the steps -> (name, ignore_merges), the usual name first
KNOWN: Mapping[tuple[str, ...], Sequence[tuple[str, bool]]] = {
    (GPT2,): _named("gpt-2 phi-2 mpt olmo jais exaone4 mellum gigachat a.x-4.0 trillion granite-docling modern-bert "
                    "jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-de jina-es roberta-bpe"),
    (DIGIT, GPT2): _named("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2"),
    (_LLAMA3,): [
        *_named("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano glm4 glm5", True),
        *_named("dbrx smaug-bpe chatglm-bpe")],
    (_JAIS2,): _named("jais-2"),
    (_QWEN2,): _named("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"),
    ("[^\\n]+|[\\n]+", _QWEN2): _named("laguna"),
    (_QWEN2.removeprefix(_CONTRACTIONS + "|"),): _named("ufakzeka"),
    (_CONTRACTIONS + rf"|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
     r"|\s+(?!\S)|\s+",): _named("qwen35"),
    (_GPT4O,): [*_named("gpt-4o llama4 kanana2 talkie minimax-m2"), *_named("granite-embed-multi-97m", True)],
    (r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O): _named("tiny_aya cohere2moe"),
    (_cased("") + r"|\p{N}" + _CASED_TAIL,): _named("tekken", True),
    (_YOUTU_SCRIPTS, _cased(_CONTRACTIONS + "?") + r"|\p{N}" + _CASED_TAIL): _named("youtu", True),
    (_KIMI,): _named("kimi-k2"),
    (_DIGITS_BY_3, _HAN_KANA, _MARKS): _named("deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    (_DIGITS_BY_3, _HAN_KANA, _SPARK, DIGIT): _named("spark2_5"),
    (r"[\r\n]", rf"\s?[{_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, DIGIT): _named("deepseek-llm"),
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, DIGIT): _named("deepseek-coder"),
    (PUNCTUATION_RUNS, GPT2, DIGITS, "[0-9][0-9][0-9]"): _named("falcon"),
    (_BLOOM,): _named("bloom poro-chat gpt3-finnish"),
    (_BLOOM, DIGIT): _named("viking"),
    ("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", DIGIT, PUNCTUATION, GPT2):
        _named("chameleon"),
    (DIGITS, r"(?=(\d{3})+(?!\d))"): _named("superbpe"),
    (_CONTRACTIONS + rf"|{_LEAD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",):
        _named("bailingmoe bailingmoe2 llada-moe"),
    (_CONTRACTIONS + rf"|{_LEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?"
     r"|\s*[\r\n]|\s+(?!\S)|\s+",): _named("exaone-moe"),
    (_CONTRACTIONS + rf"|{_LEAD}\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",):
        _named("seed-coder"),
    (_DIGITS_BY_3, _CONTRACTIONS + rf"|{_LEAD}\p{{L}}+|\p{{N}}+" + _TAIL): _named("minicpm5", True),
    (r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", _ASIAN, _MARKS): _named("afmoe"),
}  # fmt: skip

_SAME = (  # spellings of one expression -> the one that is used above
    ("\r", r"\r"), ("\n", r"\n"), ("\t", r"\t"),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTIONS),
    ("'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS), ("'(?i:[sdtm]|ll|ve|re)", _CONTRACTIONS),
    # what follows is of another class, so that giving back would help nothing
    ("]?+", "]?"), ("]++", "]+"),
)  # fmt: skip
_GPT2_SPLITS = tuple(
    start + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for start in ("'s|'t|'re|'ve|'m|'ll|'d", "'(?:[sdmt]|ll|ve|re)")
)


# Splits by these cover every text, so that dropping what they do not match drops nothing.
_COVERING = tuple(steps[-1] for steps in KNOWN if steps[-1].endswith((r"|\s+", r"|\s{1}")))


def find_pre_tokenizer(
    steps: Sequence[Mapping[str, Any]], ignore_merges: bool, known_as: str | None = None,
    indifferent: Callable[[], bool] = lambda: False,
) -> str:  # fmt: skip
    """llama.cpp's name of a pre-tokenizer.

    steps: of tokenizer.json. known_as: the name that its tokens have (known_tokenizers.py), if any. indifferent:
    whether ignore_merges changes no token; asked only when llama.cpp's name says otherwise. Raises ValueError, saying
    what is not known and what is.
    """
    found = _forms(steps)
    names = KNOWN.get(found)
    if names is None:
        unknown = " and ".join(map(_shown, found)) or "ByteLevel that does not split"
        raise ValueError(f"unknown pre-tokenizer: {unknown}; known: {_usual_names()}")
    if any(name == known_as for name, _ in names):
        return str(known_as)
    fitting = [name for name, ignores in names if ignores == ignore_merges]
    if not fitting and not indifferent():
        raise ValueError(f"pre-tokenizer {names[0][0]} with ignore_merges = {ignore_merges} is not supported")
    return fitting[0] if fitting else names[0][0]


def known_names() -> list[str]:
    return [name for names in KNOWN.values() for name, _ in names]


def _usual_names() -> str:
    return ", ".join(names[0][0] for names in KNOWN.values())


def expression_of(name: str) -> str:
    """The expression of a pre-tokenizer that has only one."""
    (expression,) = next(steps for steps, names in KNOWN.items() if any(each == name for each, _ in names))
    return expression


def _forms(steps: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The steps as KNOWN has them: regular expressions, and words for those that are none."""
    found = [_form(step, is_last=at == len(steps) - 1) for at, step in enumerate(steps)]
    if not any(step.get("type") == "ByteLevel" for step in steps):
        raise ValueError("a pre-tokenizer without ByteLevel is not supported")
    return tuple(each for each in found if each)


def _form(step: Mapping[str, Any], is_last: bool) -> str:
    kind, behavior = step.get("type"), step.get("behavior", "Isolated")
    if kind == "ByteLevel":
        if step.get("add_prefix_space"):
            raise ValueError("ByteLevel with add_prefix_space is not supported")
        return GPT2 if step.get("use_regex", True) else "" if is_last else BYTES
    if kind == "Digits":
        return DIGIT if step.get("individual_digits") else DIGITS
    if kind == "Punctuation" and behavior in ("Isolated", "Contiguous"):
        return PUNCTUATION if behavior == "Isolated" else PUNCTUATION_RUNS
    if kind == "Split":
        return _split(step)
    raise ValueError(f"unknown pre-tokenizer: {kind}; known: {_usual_names()}")


def _split(step: Mapping[str, Any]) -> str:
    pattern, behavior, invert = step.get("pattern"), step.get("behavior"), bool(step.get("invert"))
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if isinstance(regex, str):
        for spelling, ours in _SAME:
            regex = regex.replace(spelling, ours)
        if regex in _GPT2_SPLITS:
            regex = GPT2
        if (behavior == "Isolated" and not invert) or (
            behavior == "Removed" and invert and regex in (*_COVERING, GPT2)
        ):
            return regex
    raise ValueError(
        f"unknown pre-tokenizer: Split {str(pattern)[:200]} {behavior}{' inverted' if invert else ''}; known: "
        f"{_usual_names()}"
    )


def _shown(form: str) -> str:
    words = {GPT2: "ByteLevel", BYTES: "ByteLevel before another step", PUNCTUATION: "Punctuation",
             PUNCTUATION_RUNS: "Punctuation", DIGIT: "Digits", DIGITS: "Digits"}  # fmt: skip
    return words.get(form, f"Split {{'Regex': {form[:200]!r}}}")
