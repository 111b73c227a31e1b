"""The vocabulary of the random models: bytes, a few merges, three special tokens, a chat template."""

from __future__ import annotations

import gguf
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

MERGES = (
    "t h|th e|i n|e r|a n|o n|r e|an d|in g|e n|o u|o r|e s|i s|i t|a t|e d|s t|l l|a r|a l|l e|"
    "Ġ t|Ġ a|Ġ s|Ġ w|Ġ b|Ġ c|Ġ m|Ġ f|Ġ p|Ġ o|Ġ the|Ġt o|Ġo f|Ġ in|Ġ and|ou n"
).split("|")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ID_OF_FIRST_MERGE = 256  # below it the token id is the byte
ID_OF_EOS = ID_OF_FIRST_MERGE + len(MERGES)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNLIKELY = 0.1  # output rows of tokens that should not be generated are this much weaker


def add_vocabulary(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    tokens = [*byte_letters(), *(merge.replace(" ", "") for merge in MERGES), *SPECIAL_TOKENS]
    types = [gguf.TokenType.NORMAL] * ID_OF_EOS + [gguf.TokenType.CONTROL] * len(SPECIAL_TOKENS)
    n_pad = n_vocab - len(tokens)
    if n_pad < 0:
        raise ValueError(f"n_vocab is {n_vocab}, but the vocabulary needs {len(tokens)}; try vocab=False")
    tokens += [f"[PAD{n_vocab - n_pad + i}]" for i in range(n_pad)]
    types += [gguf.TokenType.UNUSED] * n_pad
    assert len(set(tokens)) == n_vocab  # llama.cpp aborts the process on a duplicate
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([int(t) for t in types])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(ID_OF_EOS)
    writer.add_eos_token_id(ID_OF_EOS)
    writer.add_eot_token_id(ID_OF_EOS + SPECIAL_TOKENS.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def byte_letters() -> list[str]:
    """The letter GPT-2's BPE writes for each byte: itself if printable, else the next from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def token_likelihood(n_vocab: int) -> FloatArray:
    """Scale of each output row: text tokens 1; bytes that are no text, special and padding tokens little.

    So a greedy reply is readable ASCII, and does not end by chance before the length asked for.
    """
    likelihood = np.full(n_vocab, UNLIKELY, np.float32)
    likelihood[0x20:0x7F] = 1.0
    likelihood[ID_OF_FIRST_MERGE:ID_OF_EOS] = 1.0
    return likelihood
