"""Texts that show where two tokenizers differ: a dozen written by hand, and as many by chance as are asked for."""

from __future__ import annotations

from random import Random

# What tokenizers differ in: contractions, digits, case, marks, spaces, lines, scripts, code, symbols.
PROBES = (
    "Hello world! It's 1234567 o'clock, they'LL say; I'd've known.",
    "  leading, trailing   and\tinner\t\tspaces  \n\n\nthree lines\r\nand \r more ",
    "def f(x_1, *args):\n        return {'k': x_1**2 + 0x1F, \"s\": f'{x!r}'}  # comment\n",
    "CamelCaseWords, ALLCAPS, snake_case, kebab-case/path.to\\file.txt @user #tag $9.99 50% 1,000.5e-3",
    "na\u00efve caf\u00e9 Stra\u00dfe \u00c5ngstr\u00f6m \u0130stanbul e\u0301 \u1e9e",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f \uc548\ub155\ud558\uc138\uc694 12 \u4e07",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\u0661\u0662\u0663 \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2603 \u221e \u2260 \u00bd \u2166 \u00b2\u00b3",
    "...!?!? --- === ((())) <a href=\"x\">y</a> && || -> => :: ;;",
    "x\u00a0y\u2003z\u200bw\ufeff",
    "1 12 123 1234 12345 123456 3.14159 007 1e10",
)
_ALPHABETS = (
    "abcdefghij", "ABCXYZ", "0123456789", " ", "\t\n\r", ".,;:!?", "'s't'LL", "()[]{}<>/\\|@#$%^&*-_=+~`\"",
    "éüßÅİ\u0301\u0323", "你好世こカ안녕", "Абвمرש", "١½Ⅷ²", "😀\u200d\ufe0f☃", "\u00a0\u3000\u200b\u2028", "นสั्",
    "\0\x01\v\f\x1b\x1f\x7f\x85\ufffd",
)  # fmt: skip
_WORDS = (
    "the", " of", "ing ", "don't", "I'M", "Über", " fjörd", "Москва", "東京都", "한국어", "مرحبا", "नमस्ते", "สวัสดี",
    "12345", "2,048", "3.14", " 1999", "1234567万", "def ", "return x", "self.", "::", "->", "!=", "http://", "</div>",
    "\n    ", "    ", "\t\t", "  \n", "\r\n\r\n", "camelCase", "HTTPServer", "snake_case", "日本A", "…", "——",
    "👩‍👩‍👧", "🇩🇪",
)  # fmt: skip


def mixed_strings(n: int, seed: int = 11) -> list[str]:
    """Letters, words, digits, marks, spaces, control characters, scripts by chance: what no author would think of."""
    random = Random(seed)

    def piece() -> str:
        if random.random() < 0.3:
            return random.choice(_WORDS)
        return "".join(random.choices(random.choice(_ALPHABETS), k=random.randint(1, 4)))

    return ["".join(piece() for _ in range(random.randint(1, 12))) for _ in range(n)]
