"""The proof of a converted tokenizer: the same tokens from llama.cpp as from the checkpoint's, on texts of all kinds.

It needs the library that the checkpoint's tokenizer was made for (reference.py). Without it nothing is proved, and the
conversion says so.
"""

from __future__ import annotations

import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_edge.convert.differences import DIFFERENCES, Difference
from moe_edge.convert.known_tokenizers import known_as
from moe_edge.convert.mixed_texts import PROBES, mixed_strings
from moe_edge.convert.ranks import merges_of, ranks_in, read_ranks
from moe_edge.convert.reference import Encode, library_of, of_json, tokenizer_of
from moe_edge.models.errors import UnknownName
from moe_edge.models.formats.files import is_present, read_file
from moe_edge.models.formats.safetensors import MAX_JSON, read_json_file
from moe_edge.models.formats.write import GGUFOutput, kv_string

N_MIXED = 1000  # texts by chance, besides those written by hand


def check_tokenizer(folder: Path, records: Mapping[str, bytes], pre: str | None) -> str | None:
    """Compare the two tokenizers; a note when that could not be done, or not wholly, None when they agree.

    records: the encoded key-values of the vocabulary. pre: the name of its pre-tokenizer. Raises UnknownName, with the
    first text that differs.
    """
    config, settings = (
        read_json_file(path) if is_present(path) else {}
        for path in (folder / "config.json", folder / "tokenizer_config.json")
    )
    theirs = tokenizer_of(folder, config, settings)
    if theirs is None:
        return f"the tokenizer was not checked against the checkpoint's: pip install {library_of(folder)}"
    path = folder / "tokenizer.json"
    described = read_file(path, MAX_JSON) if is_present(path) else b""
    notes = []
    if metaspace := b'"Metaspace"' in described:
        notes.append("llama.cpp puts a space also before a text that begins with one; the model's tokenizer does not")
    is_byte_level = pre not in (None, "gemma4")
    texts = [each for each in _texts(described, is_byte_level) if not (metaspace and each.startswith(" "))]
    apart = _compare(folder, pre, texts, (theirs, _of_llama_cpp(records)))
    if apart is not None:
        notes.append(apart)
    return "; ".join(notes) or None


def _texts(described: bytes, is_byte_level: bool) -> list[str]:
    """What to compare: in NFC when the model's tokenizer composes, which llama.cpp does not, as convert says."""
    texts = [*PROBES, *mixed_strings(N_MIXED)] if is_byte_level else [*PROBES]
    return [unicodedata.normalize("NFC", each) for each in texts] if b'"NFC"' in described else texts


def _compare(
    folder: Path, pre: str | None, texts: Sequence[str], encoders: tuple[Encode, Encode]
) -> str | None:
    """A note on texts that llama.cpp reads as other tokens than the model's tokenizer, None when there can be none.

    Raises UnknownName for a difference that is not expected of the pre-tokenizer, unless the model is one for which
    llama.cpp's own converter takes the same.
    """
    theirs, ours = encoders
    both = ((text, theirs(text), ours(text)) for text in texts)
    apart = [(text, wanted, found) for text, wanted, found in both if wanted != found]
    expected = _expected(folder, pre)
    unexpected = [each for each in apart if not any(difference.concerns(each[0]) for difference in expected)]
    if unexpected and not _is_known(folder, pre):
        text, wanted, found = unexpected[0]
        alike = (a == b for a, b in zip(wanted, found, strict=False))
        at = next((i for i, same in enumerate(alike) if not same), min(len(wanted), len(found)))
        raise UnknownName(
            f"{folder}: llama.cpp reads {text!r} as other tokens than this checkpoint's tokenizer does, from token "
            f"{at} on ({found[at : at + 4]} instead of {wanted[at : at + 4]}); convert with llama.cpp's "
            "convert_hf_to_gguf.py and give moe-edge the GGUF"
        )
    words = [each.words for each in expected] + ["other texts"] * bool(unexpected)
    if not words:
        return None
    example = f", first in {apart[0][0][:40]!r}" if apart else ""
    return (
        f"llama.cpp's pre-tokenizer {pre} may split {' and '.join(words)} otherwise than the model's: it did in "
        f"{len(apart)} of {len(texts)} mixed texts{example}"
    )


def _expected(folder: Path, pre: str | None) -> list[Difference]:
    """The differences of the pre-tokenizer, and of a ranks file with tokens that no merges make."""
    found = list(DIFFERENCES.get(pre or "", ()))
    kind = ranks_in(folder)
    if kind is not None and library_of(folder) == "tiktoken":
        _, unmerged = merges_of(read_ranks(folder / kind.file))
        if unmerged:
            words = f"texts with one of {len(unmerged)} tokens that are merged of no others"
            found.append(Difference(lambda text: any(token in text.encode() for token in unmerged), words))
    return found


def _is_known(folder: Path, pre: str | None) -> bool:
    """Whether llama.cpp's own converter would take this pre-tokenizer for this very model."""
    encode = of_json(folder / "tokenizer.json")
    return pre is not None and encode is not None and known_as(encode) == pre


def _of_llama_cpp(records: Mapping[str, bytes]) -> Encode:
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
