"""Where llama.cpp splits text otherwise than the pre-tokenizer it stands in for: on which texts it may, in words.

llama.cpp does not use the models' regular expressions as they are: some it has rewritten by hand, others for a library
that knows no classes of Unicode. Most give the same pieces. Those that do not are here, as found by comparing tokens on
mixed_texts.py; tests hold that there are no others on such texts, and docs/LOG.md has the counts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """concerns: whether a text may be split otherwise. words: which texts those are, for the user."""

    concerns: Callable[[str], bool]
    words: str


def has_other_letters(text: str) -> bool:
    """Whether some character is a letter, or a mark on one, that is not of ASCII."""
    return any(ord(each) > 127 and unicodedata.category(each)[0] in "LM" for each in text)


def has_capitals_and_others(text: str) -> bool:
    """Whether there are capitals, and letters or marks that are not of ASCII."""
    return has_other_letters(text) and any(unicodedata.category(each) in ("Lu", "Lt") for each in text)


def has_other_spaces(text: str) -> bool:
    """Whether some character is white space that is not of ASCII."""
    return any(ord(each) > 127 and each.isspace() for each in text)


def has_other_numbers(text: str) -> bool:
    """Whether some character is a number that is not a digit of ASCII."""
    return any(ord(each) > 127 and unicodedata.category(each)[0] == "N" for each in text)


def has_spaced_numbers(text: str) -> bool:
    """Whether a number comes behind more than one character of white space."""
    return re.search(r"\s\s\d", text) is not None or has_other_numbers(text)


def has_grouped_numbers(text: str) -> bool:
    """As has_spaced_numbers, and whether a letter or a mark comes right behind more than three digits."""
    behind = (text[found.end() : found.end() + 1] for found in re.finditer(r"\d{4,}", text))
    return any(each == "_" or (each and unicodedata.category(each)[0] in "LM") for each in behind) or (
        has_spaced_numbers(text)
    )


_LETTERS = Difference(has_other_letters, "words with letters beyond ASCII")
_CAPITALS = Difference(has_capitals_and_others, "words of capitals and letters beyond ASCII")
_SPACES = Difference(has_other_spaces, "spaces that are not of ASCII")
DIFFERENCES: Mapping[str, tuple[Difference, ...]] = {
    # They tell upper from lower case for ASCII only, and take a mark for no part of a word.
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2", "tekken", "kimi-k2"), (_LETTERS,)),
    "granite-embed-multi-97m": (_CAPITALS,),
    "youtu": (_CAPITALS,),  # all letters are alike to it, as to the next
    **dict.fromkeys(("tiny_aya", "cohere2moe"), (
        _CAPITALS,
        Difference(has_grouped_numbers, "numbers behind several spaces, before a letter, or not of ASCII"))),
    "afmoe": (Difference(has_spaced_numbers, "numbers behind several spaces, or not of ASCII"),),
    "superbpe": (Difference(has_other_numbers, "numbers that are not of ASCII"),),
    "deepseek-llm": (_SPACES,),
    "deepseek-coder": (_SPACES,),
}  # fmt: skip


def may_differ(pre: str | None, text: str) -> bool:
    """Whether llama.cpp's pre-tokenizer of that name may split this text otherwise than the model's own."""
    return any(each.concerns(text) for each in DIFFERENCES.get(pre or "", ()))
