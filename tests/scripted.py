"""A model that answers what it is told to: a real GGUF with experts, whose next token follows from the last one alone.

Attention and experts add nothing (their output weights are zero), so a token's state is its own embedding, and the
output row of the token that is to follow is that embedding. Everything else is a random qwen3moe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from moe_edge.models.formats.gguf import read_gguf
from moe_edge.models.formats.write import GGUFOutput, TensorSpec, kv_bool, kv_string, kv_strings
from moe_edge.models.formats.write import encode_kv as encode
from random_models import Shape, write_random_model
from random_vocabulary import ID_OF_EOS, byte_letters

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
FIRST_FREE = ID_OF_EOS + 3  # ids from here on are padding, to be given other texts


def write_scripted_model(
    path: Path,
    reply: Sequence[str],
    *,
    after: str = "\n",
    types: Mapping[str, int] | None = None,
    more_tokens: Sequence[str] = (),
    template: str | None = None,
    n_ctx: int = 2048,
    add_bos: bool = False,
) -> Path:
    """A model that says these tokens, whole texts of any length, each once, after a prompt that ends with `after`.

    types: of tokens that are not NORMAL. more_tokens: that exist besides. template: instead of random_models'.
    """
    source = write_random_model(
        path.with_name("source-" + path.name), "qwen3moe", Shape(n_layer=1, n_ctx=n_ctx), expert_type="F32",
        dense_type="F32",
    )  # fmt: skip
    file = read_gguf(source)
    tokens, kinds = list(file.kv["tokenizer.ggml.tokens"]), list(file.kv["tokenizer.ggml.token_type"])
    ids = {"\n": tokens.index(byte_letters()[10]), "<|im_end|>": tokens.index("<|im_end|>")}
    letters, free = byte_letters(), FIRST_FREE
    for text in dict.fromkeys([*reply, *more_tokens]):
        kind = (types or {}).get(text, NORMAL)
        spelt = text if kind != NORMAL else "".join(letters[byte] for byte in text.encode())
        if spelt in tokens:  # llama.cpp ends the process on a duplicate
            ids[text] = tokens.index(spelt)
        else:
            ids[text], tokens[free], kinds[free] = free, spelt, kind
            free += 1
    records = {key: file.kv.record(key) for key in file.kv}
    records["tokenizer.ggml.tokens"] = kv_strings("tokenizer.ggml.tokens", tokens)
    records["tokenizer.ggml.token_type"] = encode("tokenizer.ggml.token_type", kinds, 9, 5)
    records["tokenizer.ggml.add_bos_token"] = kv_bool("tokenizer.ggml.add_bos_token", add_bos)
    if template is not None:
        records["tokenizer.chat_template"] = kv_string("tokenizer.chat_template", template)
    chain = [ids[after], *(ids[text] for text in reply), ids["<|im_end|>"]]
    embeddings = np.random.default_rng(7).standard_normal((512, 256)).astype(np.float32)
    output = np.zeros_like(embeddings)
    for at, then in pairwise(chain):
        output[then] += embeddings[at] / np.linalg.norm(embeddings[at])
    made = {"token_embd.weight": embeddings, "output.weight": output}
    specs = [TensorSpec(entry.name, entry.shape, entry.type, entry.nbytes) for entry in file.tensors.values()]
    with GGUFOutput(path, records, specs, 32) as out, open(source, "rb") as data:
        for entry in file.tensors.values():
            if entry.name in made:
                out.write(made[entry.name].tobytes())
            elif "attn_output" in entry.name or "down_exps" in entry.name:
                out.write(bytes(entry.nbytes))
            elif entry.name == "output_norm.weight":
                out.write(np.ones(256, np.float32).tobytes())
            else:
                data.seek(entry.offset)
                out.write(data.read(entry.nbytes))
        out.finish()
        out.commit()
    source.unlink()
    return path
