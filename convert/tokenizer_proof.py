"""The proof of a converted tokenizer: the same tokens from llama.cpp as from the checkpoint's, on texts of all kinds.

It needs the `tokenizers` library for the checkpoint's side. Without it nothing is proved, and the conversion says so.
"""

from __future__ import annotations

import tempfile
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_edge.convert.pretokenizers import APART_BEYOND_ASCII, APART_IN_SPACES
from moe_edge.models.errors import UnknownName
from moe_edge.models.formats.files import is_present, read_file
from moe_edge.models.formats.safetensors import MAX_JSON
from moe_edge.models.formats.write import GGUFOutput, kv_string

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


def check_tokenizer(folder: Path, records: Mapping[str, bytes], pre: str | None) -> str | None:
    """Compare the two tokenizers; a note when that could not be done, or not wholly, None when they agree.

    records: the encoded key-values of the vocabulary. pre: the name of its pre-tokenizer. Raises UnknownName, with the
    first text that differs.
    """
    theirs = _reference(folder)
    if theirs is None:
        return "the tokenizer was not checked against the checkpoint's: pip install tokenizers"
    ours = _of_llama_cpp(records)
    described = read_file(folder / "tokenizer.json", MAX_JSON)
    composes = b'"NFC"' in described  # which llama.cpp does not, as convert says
    notes = []
    if metaspace := b'"Metaspace"' in described:
        notes.append("llama.cpp puts a space also before a text that begins with one; the model's tokenizer does not")
    if pre in APART_BEYOND_ASCII:
        notes.append(f"llama.cpp's pre-tokenizer {pre} may split words of letters beyond ASCII otherwise")
    if pre in APART_IN_SPACES:
        notes.append(f"llama.cpp's pre-tokenizer {pre} may split spaces before wide or odd ones otherwise")
    for text in (unicodedata.normalize("NFC", each) if composes else each for each in PROBES):
        if (pre in APART_BEYOND_ASCII and has_other_letters(text)) or (metaspace and text.startswith(" ")):
            continue
        wanted, found = theirs(text), ours(text)
        if wanted != found:
            alike = (a == b for a, b in zip(wanted, found, strict=False))
            at = next((i for i, same in enumerate(alike) if not same), min(len(wanted), len(found)))
            raise UnknownName(
                f"{folder}: llama.cpp reads {text!r} as other tokens than this checkpoint's tokenizer does, from token "
                f"{at} on ({found[at : at + 4]} instead of {wanted[at : at + 4]}); convert with llama.cpp's "
                "convert_hf_to_gguf.py and give moe-edge the GGUF"
            )
    return "; ".join(notes) or None


def has_other_letters(text: str) -> bool:
    """Whether some character is a letter, or a mark on one, that is not of ASCII."""
    return any(ord(each) > 127 and unicodedata.category(each)[0] in "LM" for each in text)


def has_other_spaces(text: str) -> bool:
    """Whether some character is white space that is not of ASCII."""
    return any(ord(each) > 127 and each.isspace() for each in text)


def _reference(folder: Path) -> Callable[[str], list[int]] | None:
    path = folder / "tokenizer.json"
    if not is_present(path):
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    tokenizer: Any = Tokenizer.from_file(str(path))
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def _of_llama_cpp(records: Mapping[str, bytes]) -> Callable[[str], list[int]]:
    """llama.cpp's tokenizer over a file that has nothing but the vocabulary."""
    import llama_cpp

    kvs = {"general.architecture": kv_string("general.architecture", "llama")} | dict(records)
    with tempfile.TemporaryDirectory(prefix="moe-edge-vocabulary-") as work:
        path = Path(work) / "vocabulary.gguf"
        with GGUFOutput(path, kvs, []) as output:
            output.finish()
            output.commit()
        llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)

    def encode(text: str) -> list[int]:
        return list(llama.tokenize(text.encode(), add_bos=False, special=True))

    return encode
