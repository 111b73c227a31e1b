"""Text to tokens, by llama.cpp, in a buffer as large as the text needs.

llama-cpp-python makes one as large as the context the model was trained for, whatever the text: 6 GiB where a header
claims 2^31 - 1. Its own method is replaced on each model that is loaded, so that every caller of it is served.
"""

from __future__ import annotations

from typing import Any

from moe_edge.models.errors import UsageError

MORE = 16  # tokens that a vocabulary may add to a text: its beginning, its end, a space in front


def tokenize(vocab: Any, text: bytes, add_bos: bool, special: bool) -> list[int]:
    """The tokens of a text. special: whether the names of special tokens in it are those tokens, or letters.

    Raises UsageError for a text that is too long for llama.cpp.
    """
    import llama_cpp

    room = len(text) + MORE
    for _ in range(2):
        buffer = (llama_cpp.llama_token * room)()
        found = int(llama_cpp.llama_tokenize(vocab, text, len(text), buffer, room, add_bos, special))
        if found >= 0:
            return list(buffer[:found])
        room = -found
        if room >= 1 << 31:
            break
    raise UsageError(f"a text of {len(text)} bytes has more tokens than llama.cpp can count; give a shorter one")


def with_own_tokenize(model: Any) -> Any:
    """The llama_cpp LlamaModel, tokenizing as above."""
    model.tokenize = lambda text, add_bos, special: tokenize(model.vocab, text, add_bos, special)
    return model
