"""What llama.cpp's compute buffer holds where it is fullest, tensor by tensor, at several micro-batches.

    python bench/random_moe.py two.gguf --layers 2 --embd 2048 --ff 768
    python bench/compute_buffer.py two.gguf -ub 512 -ub 1024 -ub 2048 --flash

Builds the graph of a prompt's micro-batch, has ggml place it, and computes nothing. Every tensor's place, its first and
its last use say which tensors are there at the node where most bytes are. Two that ggml put in one place, one behind
the other, count once. The last line is one JSON object. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
from layerwise import QUIET, Context
from layerwise_device import LayerDevice, Recorded


def fullest(one: Recorded) -> tuple[str, int, dict[str, int]]:
    """(the node where most bytes are in use, how many, bytes by name without the layer)."""
    place: dict[int, tuple[int, int]] = {}  # of each tensor with memory of its own: (first, last) node
    for i, node in enumerate(one.nodes):
        at = ctypes.addressof(node)
        if not node.view_src:
            place[at] = (i, i)
        for source in (*node.src, node.view_src):
            owner = one.owner(source) if source else 0
            if owner in one.by_address:
                place[owner] = (place.get(owner, (0, 0))[0], i)
    for at in one.inputs:
        place[at] = (0, place.get(at, (0, 0))[1])
    best: tuple[int, int, list[int]] = (0, 0, [])
    for i in range(len(one.nodes)):
        there = {(one.by_address[at].data or 0): at for at, (first, last) in place.items() if first <= i <= last}
        nbytes = sum(one.nbytes(one.by_address[at]) for at in there.values())
        if nbytes > best[0]:
            best = nbytes, i, list(there.values())
    nbytes, where, tensors = best
    by_name: dict[str, int] = {}
    for at in tensors:
        name = re.sub(r"-\d+", "", one.by_address[at].name.decode())
        by_name[name] = by_name.get(name, 0) + one.nbytes(one.by_address[at])
    return one.nodes[where].name.decode(), nbytes, dict(sorted(by_name.items(), key=lambda kv: -kv[1]))


def span(one: Recorded) -> int:
    """Bytes from the lowest to the highest address that the graph's tensors have."""
    own = [node for node in one.by_address.values() if node.buffer in one.buffers and not node.view_src]
    ends = [(node.data or 0, (node.data or 0) + one.nbytes(node)) for node in own]
    return max(high for _, high in ends) - min(low for low, _ in ends)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-ub", "--ubatch", type=int, action="append")
    parser.add_argument("--ctx-size", type=int, default=4096)
    parser.add_argument("--flash", action="store_true")
    o = parser.parse_args(arguments)
    llama_cpp.llama_log_set(QUIET, ctypes.c_void_p(0))
    device = LayerDevice(1)
    found = {}
    for n in o.ubatch or (512, 1024, 2048):
        context = Context(argparse.Namespace(
            model=o.model, tokens=o.ctx_size - 256, ubatch=n, threads=1, flash=o.flash
        ))  # fmt: skip
        device.to_come = 1 << 30  # nothing is computed
        context.prompt([5] * n)
        [one] = device.recorded
        where, nbytes, tensors = fullest(one)
        found[n] = {
            "fullest_at": where, "bytes": nbytes, "span": span(one), "bytes_per_token": round(nbytes / n),
            "tensors": tensors,
        }  # fmt: skip
        device.recorded.clear()
        context.close()
        print(f"micro-batch {n}: {nbytes / 2**20:.1f} MiB at {where}; {span(one) / 2**20:.1f} MiB are spanned")
        for name, size in tensors.items():
            print(f"  {size / n / 1024:8.2f} KiB a token  {name}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
