"""Text to tokens and back: the one place that asks llama.cpp's vocabulary.

llama-cpp-python's own way gives a token 32 bytes and drops longer ones in silence; indentation and rules of Markdown
are such tokens. Its tokenize allocates four bytes for every token of the trained context, which a file may claim to be
two thousand million.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from typing import Any

from moe_edge.models.errors import EngineError

FIRST_BYTES = 64  # room for a token's bytes at first


def token_bytes(llama: Any, token: int, *, special: bool = False) -> bytes:
    """The bytes of one token, of any length. special: those of control tokens too, which are empty otherwise.

    llama: llama-cpp-python's Llama, or a LlamaModel. Raises EngineError for an id that the vocabulary does not have.
    """
    import llama_cpp

    vocab = _vocab(llama)
    if not 0 <= token < llama_cpp.llama_vocab_n_tokens(vocab):
        raise EngineError(f"token {token} is not in the vocabulary, which has {llama_cpp.llama_vocab_n_tokens(vocab)}")
    size = FIRST_BYTES
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = int(llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, special))
        if n >= 0:
            return buffer.raw[:n]
        size = -n


def tokenize(llama: Any, text: str | bytes, *, special: bool, add_bos: bool) -> list[int]:
    """Token ids of a text. special: the names of control tokens become those tokens, else letters.

    add_bos: put BOS before it (and EOS behind) where the vocabulary asks for that.
    A str may hold bytes that are not UTF-8, as surrogates; they pass as they came. Raises EngineError.
    """
    import llama_cpp

    data = text.encode(errors="surrogateescape") if isinstance(text, str) else text
    vocab, room = _vocab(llama), len(data) + 8  # a token has a byte at least, most have more
    while True:
        tokens = (llama_cpp.llama_token * room)()
        n = int(llama_cpp.llama_tokenize(vocab, data, len(data), tokens, room, add_bos, special))
        if n >= 0:
            return list(tokens[:n])
        if -n <= room:
            raise EngineError(f"llama.cpp cannot tokenize a text of {len(data)} bytes")
        room = -n


def is_end(llama: Any, token: int) -> bool:
    """Whether the token ends a reply."""
    import llama_cpp

    return bool(llama_cpp.llama_vocab_is_eog(_vocab(llama), token))


def bos_wanted(llama: Any) -> int | None:
    """The token that the vocabulary wants before every text; None when it wants none."""
    import llama_cpp

    vocab = _vocab(llama)
    bos = int(llama_cpp.llama_vocab_bos(vocab))
    return bos if bos >= 0 and llama_cpp.llama_vocab_get_add_bos(vocab) else None


def find_tokens(llama: Any, texts: Collection[str]) -> frozenset[int]:
    """The control tokens among these names; a name that is no token of its own is left out."""
    found = set()
    for text in texts:
        tokens = tokenize(llama, text, special=True, add_bos=False)
        if len(tokens) == 1 and token_bytes(llama, tokens[0], special=True) == text.encode():
            found.add(tokens[0])
    return frozenset(found)


def with_own_tokenize(model: Any) -> Any:
    """llama-cpp-python's LlamaModel, tokenizing as above: every caller of its own method is served as well."""
    model.tokenize = lambda text, add_bos, special: tokenize(model, text, special=special, add_bos=add_bos)
    return model


def special_names(llama: Any) -> tuple[str, ...]:
    """The names that a text must not be able to call by writing them: control tokens, and added tokens that look like
    tags. The longest first. Worked out once for each Llama: it asks about every token."""
    known: tuple[str, ...] | None = llama.__dict__.get("_moe_edge_special_names")
    if known is None:
        known = llama._moe_edge_special_names = _find_special_names(_vocab(llama))
    return known


def _find_special_names(llama_vocab: Any) -> tuple[str, ...]:
    import llama_cpp

    control = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
    own = llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
    names = []
    for token in range(llama_cpp.llama_vocab_n_tokens(llama_vocab)):
        attributes = llama_cpp.llama_vocab_get_attr(llama_vocab, token)
        if attributes & (control | own):
            name = (llama_cpp.llama_vocab_get_text(llama_vocab, token) or b"").decode(errors="replace")
            if len(name) > 1 and (attributes & control or _looks_like_a_tag(name)):
                names.append(name)
    return tuple(sorted(names, key=len, reverse=True))


def _looks_like_a_tag(name: str) -> bool:
    return (name[0], name[-1]) in (("<", ">"), ("[", "]"))


def _vocab(llama: Any) -> Any:
    return llama._model.vocab if hasattr(llama, "_model") else llama.vocab
