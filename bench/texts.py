"""The texts every arm decodes: pieces of one file, as tokens of the model."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

from moe_edge.models.errors import MissingFile, UsageError, WorkError
from moe_edge.runner.llama import captured_log

HELD_OUT = Path(__file__).resolve().parents[2] / "shared" / "models" / "texts" / "heldout.txt"
BYTES_OF_TOKEN = 12  # more than any tokenizer makes of a token on average


def read_text(path: Path | None) -> tuple[str, str]:
    """(where from, text): the file, or the held-out texts beside the project, or else Python's own help pages."""
    if path is None and HELD_OUT.exists():
        path = HELD_OUT
    if path is not None:
        try:
            return path.name, path.read_text(errors="replace")
        except OSError as error:
            raise MissingFile(f"{path}: cannot be read: {error.strerror}") from error
    from pydoc_data.topics import topics

    return "pydoc_data.topics", "\n".join(topics[name] for name in sorted(topics))


def pick_tokens(model: Path, text: str, n_texts: int, n_tokens: int) -> list[list[int]]:
    """n_texts lists of n_tokens tokens, from places spread evenly over the text.

    A model without a vocabulary gets random tokens. Raises UsageError when the text is too short.
    """
    with _Vocabulary(model) as vocabulary:
        if not vocabulary.has_tokenizer:
            return [random.Random(i).choices(range(vocabulary.n_tokens), k=n_tokens) for i in range(n_texts)]
        picked = [vocabulary.tokenize(piece)[:n_tokens] for piece in _pieces(text, n_texts, n_tokens * BYTES_OF_TOKEN)]
    shortest = min(len(tokens) for tokens in picked)
    if shortest < n_tokens:
        raise UsageError(
            f"the text gives a piece of {shortest} tokens, {n_texts} of {n_tokens} are needed; "
            "try a longer --text, fewer --texts or fewer --tokens"
        )
    return picked


def _pieces(text: str, n_pieces: int, size: int) -> list[str]:
    """Pieces that start behind a line's end, at evenly spaced places."""
    starts = [len(text) * i // n_pieces for i in range(n_pieces)]
    starts = [0 if at == 0 else text.find("\n", at) + 1 for at in starts]
    return [text[at : at + size] for at in starts]


class _Vocabulary:
    """The tokenizer of a GGUF, without its weights; closed at the end of `with`."""

    def __init__(self, model: Path) -> None:
        import llama_cpp

        self._llama = llama_cpp
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        with captured_log():
            self._model = llama_cpp.llama_model_load_from_file(os.fsencode(model), params)
        if not self._model:
            raise WorkError(f"{model}: llama.cpp cannot read its vocabulary")
        self._vocab: Any = llama_cpp.llama_model_get_vocab(self._model)
        self.n_tokens = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self.has_tokenizer = llama_cpp.llama_vocab_type(self._vocab) != llama_cpp.LLAMA_VOCAB_TYPE_NONE

    def __enter__(self) -> _Vocabulary:
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.llama_model_free(self._model)

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        buffer = (self._llama.llama_token * (len(data) + 8))()
        n = self._llama.llama_tokenize(self._vocab, data, len(data), buffer, len(buffer), True, False)
        return list(buffer[: max(n, 0)])
