"""Several micro-batches through one layer before the next: is it exact, what does it read, what does it keep?

    python bench/layerwise.py MODEL.gguf --tokens 2048 -ub 512

Evaluates a prompt with stock llama.cpp, and again with bench/layerwise_device.py, which keeps micro-batches back and
computes all of them layer by layer. Compares logits, the whole KV cache, and tokens that follow, bit by bit. Experts
stay in memory, as stock has them: which would be read is replayed from what each micro-batch used. It is a prototype
and no part of the product; docs/LOG.md, 2026-11-28, says what is missing. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from layerwise_device import LayerDevice, Recorded

N_FOLLOW = 8  # tokens behind the prompt
SHARES = (0.1, 0.25, 0.4, 0.6)  # of all experts, in memory


class Context:
    """A model and a context of llama.cpp, as stock has them, but for repacked weights."""

    def __init__(self, o: argparse.Namespace) -> None:
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = False
        self.model = llama_cpp.llama_model_load_from_file(str(o.model).encode(), params)
        if not self.model:
            raise SystemExit(f"{o.model}: llama.cpp does not load it")
        self.n_ubatch = o.ubatch
        c = llama_cpp.llama_context_default_params()
        c.n_ctx = o.tokens + 256
        c.n_batch = c.n_ubatch = o.ubatch
        c.n_threads = c.n_threads_batch = o.threads
        c.flash_attn_type = int(o.flash)
        self.context = llama_cpp.llama_init_from_model(self.model, c)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def decode(self, tokens: Sequence[int]) -> None:
        own = (llama_cpp.llama_token * len(tokens))(*tokens)
        if status := llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(own, len(tokens))):
            raise SystemExit(f"llama_decode: {status}")

    def prompt(self, tokens: Sequence[int]) -> float:
        """How many seconds it took."""
        started = time.monotonic()
        for at in range(0, len(tokens), self.n_ubatch):
            self.decode(tokens[at : at + self.n_ubatch])
        self.logits()
        return time.monotonic() - started

    def logits(self) -> Any:
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (self.n_vocab,)).copy()

    def state(self) -> bytes:
        n = llama_cpp.llama_state_get_size(self.context)
        into = (ctypes.c_uint8 * n)()
        return bytes(into[: llama_cpp.llama_state_get_data(self.context, into, n)])

    def follow(self) -> list[Any]:
        found = []
        for _ in range(N_FOLLOW):
            self.decode([int(self.logits().argmax())])
            found.append(self.logits())
        return found

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


def reads(uses: Iterable[tuple[int, set[int]]], places: int) -> int:
    """How many experts an LRU cache with so many places reads for (layer, experts) in this order."""
    held: OrderedDict[tuple[int, int], None] = OrderedDict()
    n = 0
    for layer, experts in uses:
        for key in ((layer, each) for each in sorted(experts)):
            n += key not in held
            held[key] = None
            held.move_to_end(key)
            if len(held) > places:
                held.popitem(last=False)
    return n


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("-ub", "--ubatch", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flash", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args(arguments)
    if o.tokens <= o.ubatch:
        parser.error("--tokens: more than one micro-batch, else there is nothing to keep back")
    llama_cpp.llama_log_set(QUIET, ctypes.c_void_p(0))
    stock = Context(o)
    drawn = random.Random(o.seed)
    tokens = [drawn.randrange(3, stock.n_vocab) for _ in range(o.tokens)]
    seconds = [stock.prompt(tokens)]
    want = stock.logits(), stock.state(), stock.follow()
    stock.close()

    device = LayerDevice(o.threads)
    ours = Context(o)
    uses: dict[int, list[set[int]]] = {}
    kept: dict[str, int] = {"graph": 0, "inputs": 0, "between_layers": 0}
    n = -(-o.tokens // o.ubatch)

    def each(number: int, one: Recorded) -> None:
        uses.setdefault(number, []).append(one.experts(number))
        new = sum(len(data) for where, data in one.kept.items() if where not in one.inputs)
        inputs = sum(map(len, one.inputs.values()))
        for name, nbytes in (("graph", one.nbytes_copied), ("inputs", inputs), ("between_layers", new)):
            kept[name] = max(kept[name], nbytes)

    device.each, device.to_come = each, n
    try:
        seconds.append(ours.prompt(tokens))
    finally:
        if device.failed is not None:
            raise device.failed
    one_piece = device.n_graphs == n
    got = ours.logits(), ours.state(), ours.follow()
    same = {
        "logits": bool(np.array_equal(want[0], got[0])), "kv_cache": want[1] == got[1],
        "tokens_that_follow": all(np.array_equal(a, b) for a, b in zip(want[2], got[2], strict=True)),
    }  # fmt: skip
    ours.close()
    report(n, uses, kept, same, one_piece, seconds)
    return 0 if all(same.values()) else 1


def report(
    n: int, uses: dict[int, list[set[int]]], kept: dict[str, int], same: dict[str, bool], one_piece: bool,
    seconds: Sequence[float],
) -> None:
    """One line of JSON: what was the same, what would be read at shares of all experts in memory."""
    touched = sum(len(set().union(*sets)) for sets in uses.values())
    by_layer = [(layer, experts) for layer, sets in sorted(uses.items()) for experts in sets]
    by_batch = [(layer, sets[at]) for at in range(n) for layer, sets in sorted(uses.items())]
    found = {
        str(share): [reads(by_batch, int(share * touched)), reads(by_layer, int(share * touched))] for share in SHARES
    }
    print(json.dumps({
        "micro_batches": n, "same": same, "one_piece": one_piece, "bytes_kept_of_a_micro_batch": kept,
        "seconds_one_after_the_other_and_by_layer": [round(each, 3) for each in seconds],
        "experts_touched": touched, "reads_by_share_one_batch_after_the_other_and_layer_by_layer": found,
    }))  # fmt: skip


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
def QUIET(level: int, text: bytes, _user: object) -> None:
    if level >= 4:
        sys.stderr.write(text.decode(errors="replace"))


if __name__ == "__main__":
    sys.exit(main())
